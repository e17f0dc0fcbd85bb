"""Arrays inside messages: raw little-endian bytes, so that nobody spends Python time on single tokens."""

from typing import Any, TypeAlias

import numpy as np

#: Bytes of little-endian int32 and float32.
IntArray: TypeAlias = bytes
FloatArray: TypeAlias = bytes


def pack_ints(values: Any) -> IntArray:
    """Token ids as bytes of little-endian int32."""
    return np.asarray(values, dtype="<i4").tobytes()


def unpack_ints(data: IntArray) -> np.ndarray:
    """Inverse of :func:`pack_ints`; int32 [n]."""
    return np.frombuffer(data, dtype="<i4")


def pack_floats(values: Any) -> FloatArray:
    """Log-probabilities as bytes of little-endian float32."""
    return np.asarray(values, dtype="<f4").tobytes()


def unpack_floats(data: FloatArray) -> np.ndarray:
    """Inverse of :func:`pack_floats`; float32 [n]."""
    return np.frombuffer(data, dtype="<f4")
