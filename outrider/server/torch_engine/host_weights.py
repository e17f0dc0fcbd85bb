"""Published versions on the server's side: fetched and verified once, in a host buffer that all replicas read."""

import mmap
import os
import tempfile
import threading
import time

import msgspec
import torch
from torch import Tensor

from outrider.contract.control import WeightStatus
from outrider.contract.manifest import Manifest, manifest_faults
from outrider.server.engine import Conflict
from outrider.server.torch_engine.messages import Stage, TensorPlace
from outrider.weights.fetch import FetchError, fetch_tensors

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


class HostWeights:
    """Two buffers: the version in use, so that a replica that is started anew gets it, and the one being staged.

    :meth:`stage` may run on any thread, one call at a time; it changes nothing that is in use.
    """

    def __init__(self, tensors: list[tuple[str, tuple[int, ...]]], dtype: torch.dtype, fingerprint: str) -> None:
        self.shapes = dict(tensors)
        self.dtype, self.fingerprint = dtype, fingerprint
        self.status = WeightStatus(version=0, run_id="", state="idle")
        self.places: list[TensorPlace] = []
        length = 0
        for name, shape in tensors:
            self.places.append(TensorPlace(name=name, shape=shape, offset=length))
            size = torch.Size(shape).numel() * dtype.itemsize
            length += size + -size % _ALIGNMENT
        self.length = length
        self._buffers: list[HostBuffer] = []
        #: Buffer that holds the version in use; -1 while that is the one loaded from disk.
        self._live = -1
        self._staged_run = ""
        # A stage must not begin to fill the idle buffer while a commit is making it the live one.
        self._swapping = threading.Lock()

    def stage(self, manifest: Manifest, key: str) -> Stage:
        """Fetch, verify and convert ``manifest``'s tensors. key: API key for reading pieces from another host.

        Returns what replicas are to copy; :meth:`staged` follows when they have. Raises Conflict, and leaves the
        weights in use alone, when the manifest is for another model, contradicts itself, or its bytes cannot be read
        or do not have their checksums.
        """
        with self._swapping:
            self.status.state, self.status.staged_version, self.status.error = "staging", None, None
        self._started = time.monotonic()
        try:
            self._check(manifest)
            while len(self._buffers) < 2:
                self._buffers.append(HostBuffer(self.length))
            fetch_tensors(manifest, self._tensors(self._idle), key)
        except (Conflict, FetchError) as error:
            raise Conflict(self.refuse(manifest, error)) from error
        except Exception as error:  # such as memory that does not suffice
            self.refuse(manifest, error)
            raise
        return self._order(self._idle)

    def staged(self, manifest: Manifest) -> WeightStatus:
        """All replicas hold the version."""
        self._staged_run = manifest.run_id
        self.status.state, self.status.staged_version = "staged", manifest.version
        self.status.stage_seconds = time.monotonic() - self._started
        return msgspec.structs.replace(self.status)

    def check_commit(self, run_id: str, version: int) -> None:
        """Raises Conflict when something else than this version, or nothing, is staged."""
        if self.status.state != "staged" or (self._staged_run, self.status.staged_version) != (run_id, version):
            staged = f"version {self.status.staged_version} of run {self._staged_run}"
            found = staged if self.status.state == "staged" else "nothing"
            raise Conflict(f"commit of version {version} of run {run_id}: {found} is staged; stage it first")

    def committed(self, run_id: str, version: int, seconds: float) -> WeightStatus:
        """The replicas have switched. seconds: that the slowest of them stood still for it."""
        with self._swapping:
            self._live = self._idle
            self.status.version, self.status.run_id = version, run_id
            self.status.state, self.status.staged_version = "idle", None
            self.status.commit_seconds = seconds
            return msgspec.structs.replace(self.status)

    def unstage(self) -> None:
        """Forget what is staged: not every replica holds it."""
        if self.status.state == "staged":
            self.status.state, self.status.staged_version = "idle", None

    def live(self) -> Stage | None:
        """The version in use, for a replica that is started anew; None when that is the one on disk."""
        return None if self._live < 0 else self._order(self._live)

    def refuse(self, manifest: Manifest, error: Exception) -> str:
        """The stage has failed. Returns the reason in words."""
        self.status.state = "failed"
        self.status.error = f"version {manifest.version} of run {manifest.run_id} refused: {error}"
        return self.status.error

    def close(self) -> None:
        """Let the buffers go."""
        for buffer in self._buffers:
            buffer.close()
        self._buffers.clear()

    @property
    def _idle(self) -> int:
        return 1 if self._live == 0 else 0

    def _order(self, index: int) -> Stage:
        return Stage(path=self._buffers[index].path, length=self.length, places=self.places)

    def _tensors(self, index: int) -> dict[str, Tensor]:
        whole = torch.frombuffer(self._buffers[index].memory, dtype=torch.uint8)
        tensors = {}
        for place in self.places:
            length = torch.Size(place.shape).numel() * self.dtype.itemsize
            tensors[place.name] = whole[place.offset : place.offset + length].view(self.dtype).view(place.shape)
        return tensors

    def _check(self, manifest: Manifest) -> None:
        if manifest.model_fingerprint != self.fingerprint:
            raise Conflict(
                f"it is of a model with fingerprint {manifest.model_fingerprint}, this server's is {self.fingerprint}"
            )
        faults = manifest_faults(manifest)
        given = {tensor.name: tensor.shape for tensor in manifest.tensors}
        faults += [f"tensor {name!r} is missing" for name in self.shapes.keys() - given.keys()]
        faults += [f"tensor {name!r} is unknown here" for name in given.keys() - self.shapes.keys()]
        faults += [
            f"tensor {name!r} has shape {list(shape)}, here {list(self.shapes[name])}"
            for name, shape in given.items()
            if name in self.shapes and tuple(self.shapes[name]) != tuple(shape)
        ]
        if faults:
            raise Conflict("; ".join(faults[:3]) + (f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""))
