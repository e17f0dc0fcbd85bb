"""Publishing: every rank copies its weights into shared memory, off the training thread."""

import fcntl
import mmap
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash
from torch import Tensor

from outrider.contract.errors import UserError
from outrider.contract.identity import host_identity
from outrider.contract.manifest import DTYPE_BYTES, DTypeName, Manifest, Piece, Segment, TensorEntry
from outrider.weights.buffers import pin
from outrider.weights.segments import segment_directory, segment_path

#: Versions kept at once: one that servers may be reading, and one being written.
BUFFERS = 2

_ALIGNMENT = 64


class Publisher:
    """Writes versions of one model's weights, alternately into two segments, and describes them in manifests.

    A server that is still reading version v while v+2 is being written over it finds checksums that do not match,
    refuses, and stages the newest version instead; so the trainer never waits for a server.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        dtype: DTypeName,
        run_id: str,
        fingerprint: str,
        segment_url: str | None,
        announce: Callable[[Manifest], None] | None = None,
        shapes: dict[str, tuple[int, ...]] | None = None,
        refresh: Callable[[], None] | None = None,
    ) -> None:
        """tensors: name → this rank's rows of a tensor, whose storage stays the same over steps. segment_url: prefix
        under which a segment's name is served to other hosts. announce: called with every manifest, on the copying
        thread. shapes: of the whole tensors, where this rank has not all of them. refresh: brings ``tensors`` up to
        date, where they are not the weights themselves; called before each copy, on the thread that publishes.
        Raises UserError when shared memory is too small."""
        self._shapes = shapes or {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.tensors, self.dtype, self.run_id, self.fingerprint = tensors, dtype, run_id, fingerprint
        self._offsets: dict[str, tuple[int, int]] = {}
        end = 0
        for name, tensor in tensors.items():
            length = tensor.numel() * DTYPE_BYTES[dtype]
            self._offsets[name] = (end, length)
            end += -(-length // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = end
        self._announce, self._refresh = announce, refresh
        device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
        self._device = device if device.type == "cuda" else None
        self._stream = None if self._device is None else torch.cuda.Stream(self._device)
        self._copied = threading.Event()
        self._copied.set()
        #: Beside training on a CPU, checksums get one thread; beside a GPU, several.
        self._checkers = 1 if self._device is None else min(8, os.cpu_count() or 1)
        self._files: dict[Path, BinaryIO] = {}
        try:
            self._buffers = [self._create(index, segment_url) for index in range(BUFFERS)]
        except OSError as error:
            self._remove_files()
            raise UserError(
                f"publishing weights: {BUFFERS} x {self.nbytes / 2**20:.0f} MiB do not fit in {segment_directory()} "
                f"({error.strerror}); enlarge it (in containers: --shm-size)"
            ) from error
        self._pool = ThreadPoolExecutor(1, "publish")
        self._pending: Future[Manifest] | None = None

    def _use_device(self) -> None:
        """A thread begins on the first GPU, and would make a context of CUDA there."""
        if self._device is not None:
            torch.cuda.set_device(self._device)

    def publish(self, version: int) -> "Future[Manifest]":
        """Start to copy the weights as version ``version``. They must not change until :meth:`wait` returns."""
        self.finish()
        if self._refresh is not None:
            self._refresh()
        ready = None
        if self._device is not None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
        self._copied.clear()
        self._pending = self._pool.submit(self._write, version, ready)
        return self._pending

    def wait(self) -> float:
        """Wait for the copy in progress, after which the weights may change; returns the seconds waited."""
        if self._copied.is_set():
            return 0.0
        started = time.monotonic()
        self._copied.wait()
        return time.monotonic() - started

    def finish(self) -> None:
        """Wait until the latest version is whole, described and announced. Raises what went wrong with it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Remove the segments."""
        self._pool.shutdown(wait=True)
        self._remove_files()

    def _remove_files(self) -> None:
        for path, file in self._files.items():
            path.unlink(missing_ok=True)
            file.close()

    @torch.no_grad()
    def _write(self, version: int, ready: torch.cuda.Event | None) -> Manifest:
        segment, mapped, landing = self._buffers[version % BUFFERS]
        try:
            self._use_device()
            self._copy(landing, ready)
        finally:
            self._copied.set()

        def entry(item: tuple[str, Tensor]) -> TensorEntry:
            name, _ = item
            offset, length = self._offsets[name]
            checksum = xxhash.xxh3_64_intdigest(mapped[offset : offset + length])
            piece = Piece(segment=0, offset=offset, length=length, checksum=checksum)
            return TensorEntry(name=name, dtype=self.dtype, shape=self._shapes[name], pieces=(piece,))

        with ThreadPoolExecutor(self._checkers) as pool:
            entries = tuple(pool.map(entry, self.tensors.items()))
        manifest = Manifest(
            run_id=self.run_id,
            version=version,
            model_fingerprint=self.fingerprint,
            segments=(segment,),
            tensors=entries,
        )
        if self._announce is not None:
            self._announce(manifest)
        return manifest

    def _copy(self, landing: Tensor, ready: torch.cuda.Event | None) -> None:
        """Cast and copy every tensor to its place. From a GPU: on a stream of its own, once ``ready`` has come."""
        dtype = getattr(torch, self.dtype)
        stream = self._stream
        if stream is not None and ready is not None:
            stream.wait_event(ready)
        with torch.cuda.stream(stream):
            for name, tensor in self.tensors.items():
                offset, length = self._offsets[name]
                place = landing[offset : offset + length].view(dtype).view(tensor.shape)
                place.copy_(tensor.to(dtype) if stream is not None else tensor, non_blocking=True)
        if stream is not None:
            stream.synchronize()

    def _create(self, index: int, segment_url: str | None) -> tuple[Segment, memoryview, Tensor]:
        path = segment_path(self.run_id, index)
        file = open(path, "x+b", opener=lambda name, flags: os.open(name, flags, 0o600))  # noqa: SIM115
        self._files[path] = file
        # Held as long as this process lives: how remove_stale_segments knows that the segment is in use.
        fcntl.flock(file, fcntl.LOCK_EX)
        # Reserves the pages now: a full /dev/shm is an error here and not a bus error later.
        os.posix_fallocate(file.fileno(), 0, max(self.nbytes, 1))
        mapped = mmap.mmap(file.fileno(), max(self.nbytes, 1))
        url = f"{segment_url}/{path.name}" if segment_url else None
        segment = Segment(host=host_identity(), path=str(path), length=self.nbytes, url=url)
        landing = torch.frombuffer(mapped, dtype=torch.uint8)
        if self._device is not None:
            pin(landing)
        return segment, memoryview(mapped), landing
