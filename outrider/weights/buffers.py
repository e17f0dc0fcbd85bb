"""Host memory that holds a version of the weights for other processes of this machine."""

import contextlib
import mmap
import os
import tempfile
import time

import torch
from torch import Tensor

#: Tensors begin at multiples of this, bytes.
_ALIGNMENT = 64


class HostBuffer:
    """Memory that other processes of this machine open by its path; gone with the last of them."""

    def __init__(self, length: int) -> None:
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create("outrider-weights")
            self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        else:
            self._file, self.path = tempfile.mkstemp(prefix="outrider-weights-")
        os.ftruncate(self._file, length)
        self.length = length
        self.memory = mmap.mmap(self._file, length)

    def close(self) -> None:
        """Let go of it. A replica that has it open keeps it until it is through."""
        if not self.path.startswith("/proc/"):
            os.unlink(self.path)
        os.close(self._file)


class BufferLayout:
    """Where each tensor lies in a buffer. offsets: bytes, by name; length: of the whole."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.shapes, self.dtype = shapes, dtype
        self.offsets: dict[str, int] = {}
        self.length = 0
        for name in shapes:
            self.offsets[name] = self.length
            size = self.nbytes(name)
            self.length += size + -size % _ALIGNMENT

    def nbytes(self, name: str) -> int:
        """Bytes of one tensor."""
        return torch.Size(self.shapes[name]).numel() * self.dtype.itemsize

    def tensors(self, buffer: HostBuffer) -> dict[str, Tensor]:
        """Views of ``buffer``, by name."""
        whole = torch.frombuffer(buffer.memory, dtype=torch.uint8)
        return {
            name: whole[offset : offset + self.nbytes(name)].view(self.dtype).view(self.shapes[name])
            for name, offset in self.offsets.items()
        }


def pin(memory: Tensor, at_once: int | None = None) -> bool:
    """Register mapped memory with CUDA, whose copies then go at the link's speed. False where that is not to be had:
    they take longer. memory: bytes, [n], from the beginning of a page on.

    at_once: bytes of a piece, of whole pages. While CUDA takes hold of pages, for 0.1 to 0.3 s a gigabyte, no other
    thread of the process gets to it; after each piece others have as long. No copy may then go across the end of one.
    """
    for piece in memory.split(at_once or len(memory)):
        started = time.monotonic()
        if int(torch.cuda.cudart().cudaHostRegister(piece.data_ptr(), len(piece), 0)) != 0:
            # The failure stays CUDA's last error, and the next kernel would be blamed for it.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device="cuda").add_(1)
            if done := piece.data_ptr() - memory.data_ptr():
                unpin(memory[:done], at_once)
            return False
        if at_once:
            time.sleep(time.monotonic() - started)
    return True


def unpin(memory: Tensor, at_once: int | None = None) -> None:
    """Take back what :func:`pin` has done with the same arguments."""
    for piece in memory.split(at_once or len(memory)):
        started = time.monotonic()
        torch.cuda.cudart().cudaHostUnregister(piece.data_ptr())
        if at_once:
            time.sleep(time.monotonic() - started)
