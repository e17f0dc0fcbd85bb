"""Where segments lie, and who cleans up after a trainer that was killed. Imports no torch."""

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path


def segment_directory() -> Path:
    """Shared memory where the system has it, else the directory for temporary files."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def segment_path(run_id: str, index: int) -> Path:
    """Path of one segment of this process."""
    return segment_directory() / f"outrider-{run_id}-{os.getpid()}-{index}"


def remove_stale_segments() -> int:
    """Delete this user's segments whose publisher is gone, killed before it could. Returns how many."""
    removed = 0
    for path in segment_directory().glob("outrider-*-*-*"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if os.fstat(file.fileno()).st_uid == os.getuid():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its publisher lives
                path.unlink()
                removed += 1
    return removed
