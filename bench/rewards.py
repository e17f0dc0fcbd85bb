"""Rewards for models that have nothing to learn."""

import zlib
from typing import Any


def varied(completions: list[str], **columns: Any) -> list[float]:
    """Something of every completion has to be read, and rewards have to differ within a group."""
    return [float(zlib.crc32(text.encode()) % 7) for text in completions]
