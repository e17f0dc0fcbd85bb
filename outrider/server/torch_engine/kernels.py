"""The compiled functions of ``kernels.c``: what they take, and where they are found.

Attention reads every key and value once, exactly as many as a sequence has, and needs neither masks nor padding: it
takes a third of the time that torch's operations take for few sequences, and for many as long as memory takes. They
are for the CPU and float32. Where the installation had no C compiler there are none, and torch does the work.
"""

import ctypes
import functools
import logging
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

#: Builds by what torch says that the processor can do.
_BUILDS = {"AVX512": "avx512", "AVX2": "avx2"}

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


@functools.cache
def library() -> ctypes.CDLL | None:
    """The build for this processor, or None where there is none."""
    name = "_kernels_" + _BUILDS.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(name + suffix)
        if path.exists():
            found = ctypes.CDLL(str(path))
            found.outrider_attend.argtypes = [*[_POINTER] * 7, *[_INT] * 6, _FLOAT, _FLOAT, _INT, _INT, *[_POINTER] * 2]
            found.outrider_attend.restype = None
            found.outrider_rms_norm.argtypes = [_POINTER, _POINTER, _INT, _INT, _FLOAT, _FLOAT, _POINTER]
            found.outrider_rms_norm.restype = None
            found.outrider_rotate.argtypes = [_POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _POINTER]
            found.outrider_rotate.restype = None
            return found
    log.warning(
        "%s is not there: this installation had no C compiler, and the CPU engine is slower than it could be; install "
        "one and reinstall outrider",
        name,
    )
    return None


def _loaded() -> ctypes.CDLL:
    found = library()
    assert found is not None, "call usable() first"
    return found


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for a model on ``device`` in ``dtype``."""
    return device.type == "cpu" and dtype == torch.float32 and library() is not None


def attend(
    queries: Tensor, new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor, slots: Tensor,
    positions: Tensor, window: int | None, scale: float, softcap: float | None, heads: range, out: Tensor,
) -> None:  # fmt: skip
    """Write the keys and values of a step's tokens into their slots, and attend, causally.

    queries, out [tokens, key-value heads, groups, size]; new_keys, new_values [tokens, key-value heads, size]; keys
    [slots, key-value heads, blocks, size, 16] and values [slots, key-value heads, room, size] of one layer; slots,
    positions int64 [n], for the first n tokens; all contiguous. size is a multiple of 16. A slot's tokens come in the
    order of their positions.
    heads: the key-value heads to do; several threads may do different ones at the same time.
    """
    _, count, groups, size = queries.shape
    room = values.shape[-2]
    scratch = torch.empty(2, room)
    _loaded().outrider_attend(
        queries.data_ptr(), new_keys.data_ptr(), new_values.data_ptr(), keys.data_ptr(), values.data_ptr(),
        slots.data_ptr(), positions.data_ptr(), len(slots), count, groups, size, room, window or room, scale,
        softcap or 0.0, heads.start, heads.stop, out.data_ptr(), scratch.data_ptr(),
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
    """``x / sqrt(mean(x²) + epsilon) · (offset + weight)`` over the last dimension (Zhang & Sennrich 2019,
    arXiv:1910.07467, equation 4). x [..., size] contiguous, weight [size]."""
    out = torch.empty_like(x)
    size = x.shape[-1]
    rows = x.numel() // size
    _loaded().outrider_rms_norm(x.data_ptr(), weight.data_ptr(), rows, size, epsilon, offset, out.data_ptr())
    return out


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864, equation 34, with the pairs half a head apart).

    x [tokens, heads, size]; cosines, sines [tokens, size]; all contiguous.
    """
    out = torch.empty_like(x)
    tokens, heads, size = x.shape
    _loaded().outrider_rotate(x.data_ptr(), cosines.data_ptr(), sines.data_ptr(), tokens, heads, size, out.data_ptr())
    return out
