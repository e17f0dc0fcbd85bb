"""What is to survive a power cut."""

import os
from pathlib import Path


def synchronize(path: Path) -> None:
    """Return when a file, or what a directory lists, is on disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
