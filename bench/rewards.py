"""Rewards for models that have nothing to learn."""

import zlib
from typing import Any


def varied(completions: list[str], signal: list[bool], **columns: Any) -> list[float]:
    """Something of every completion has to be read; rewards differ within a group whose column ``signal`` is true."""
    values = [float(zlib.crc32(text.encode()) % 7) for text in completions]
    return [value if has else 0.0 for value, has in zip(values, signal, strict=True)]
