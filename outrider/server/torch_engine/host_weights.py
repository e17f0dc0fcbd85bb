"""Published versions on the server's side: fetched and verified once, in a host buffer that all replicas read."""

import torch

from outrider.contract.control import WeightStatus
from outrider.contract.manifest import Manifest
from outrider.server.engine import Conflict
from outrider.server.torch_engine.messages import Stage, TensorPlace
from outrider.server.weight_state import WeightState
from outrider.weights.buffers import BufferLayout, HostBuffer
from outrider.weights.checksums import FetchError
from outrider.weights.fetch import fetch_tensors


class HostWeights(WeightState):
    """Two buffers: the version in use, so that a replica that is started anew gets it, and the one being staged.

    :meth:`stage` may run on any thread, one call at a time; it changes nothing that is in use.
    """

    def __init__(self, tensors: list[tuple[str, tuple[int, ...]]], dtype: torch.dtype, fingerprint: str) -> None:
        super().__init__(dict(tensors), fingerprint)
        self.layout = BufferLayout(self.shapes, dtype)
        self._buffers: list[HostBuffer] = []
        #: Buffer that holds the version in use; -1 while that is the one loaded from disk.
        self._live = -1

    def stage(self, manifest: Manifest, key: str) -> Stage:
        """Fetch, verify and convert ``manifest``'s tensors. key: API key for reading pieces from another host.

        Returns what replicas are to copy; :meth:`staged` follows when they have. Raises Conflict, and leaves the
        weights in use alone, when the manifest is for another model, contradicts itself, or its bytes cannot be read
        or do not have their checksums.
        """
        self.begin()
        try:
            self.check(manifest)
            while len(self._buffers) < 2:
                self._buffers.append(HostBuffer(self.layout.length))
            fetch_tensors(manifest, self.layout.tensors(self._buffers[self._idle]), key)
        except (Conflict, FetchError) as error:
            raise Conflict(self.refuse(manifest, error)) from error
        except Exception as error:  # such as memory that does not suffice
            self.refuse(manifest, error)
            raise
        return self._order(self._idle)

    def committed(self, run_id: str, version: int, seconds: float) -> WeightStatus:
        with self.swapping:
            self._live = self._idle
            return super().committed(run_id, version, seconds)

    def live(self) -> Stage | None:
        """The version in use, for a replica that is started anew; None when that is the one on disk."""
        return None if self._live < 0 else self._order(self._live)

    def close(self) -> None:
        """Let the buffers go."""
        for buffer in self._buffers:
            buffer.close()
        self._buffers.clear()

    @property
    def _idle(self) -> int:
        return 1 if self._live == 0 else 0

    def _order(self, index: int) -> Stage:
        places = [
            TensorPlace(name=name, shape=self.shapes[name], offset=offset)
            for name, offset in self.layout.offsets.items()
        ]
        return Stage(path=self._buffers[index].path, length=self.layout.length, places=places)
