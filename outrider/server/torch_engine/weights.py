"""The weights in use, and the next ones beside them."""

import threading
import time

import msgspec
import torch
from torch import Tensor, nn

from outrider.contract.control import WeightStatus
from outrider.contract.manifest import Manifest, manifest_faults
from outrider.server.engine import Conflict
from outrider.weights.fetch import FetchError, fetch_tensors


class StagedWeights:
    """Two sets of weights of one model. Staging fills the idle set while the other is in use; committing swaps
    the storage of every parameter, which takes no copying.

    :meth:`stage` may run on any thread, one call at a time; :meth:`commit` only between two engine steps.
    """

    def __init__(self, model: nn.Module, fingerprint: str) -> None:
        self.live: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.fingerprint = fingerprint
        self.idle: dict[str, Tensor] | None = None
        self.status = WeightStatus(version=0, run_id="", state="idle")
        self._staged_run = ""
        # A stage must not begin to fill the idle set while a commit is making it the live one.
        self._swapping = threading.Lock()

    def stage(self, manifest: Manifest, key: str) -> WeightStatus:
        """Fetch, verify and convert ``manifest``'s tensors. key: API key for reading pieces from another host.

        Raises Conflict, and leaves the weights in use alone, when the manifest is for another model, contradicts
        itself, or its bytes cannot be read or do not have their checksums.
        """
        started = time.monotonic()
        with self._swapping:
            self.status.state, self.status.staged_version, self.status.error = "staging", None, None
        try:
            self._check(manifest)
            if self.idle is None:
                self.idle = {name: torch.empty_like(parameter.data) for name, parameter in self.live.items()}
            fetch_tensors(manifest, self.idle, key)
        except (Conflict, FetchError) as error:
            raise Conflict(self._refused(manifest, error)) from error
        except Exception as error:  # such as memory that does not suffice
            self._refused(manifest, error)
            raise
        self._staged_run = manifest.run_id
        self.status.state, self.status.staged_version = "staged", manifest.version
        self.status.stage_seconds = time.monotonic() - started
        return msgspec.structs.replace(self.status)

    def commit(self, run_id: str, version: int) -> WeightStatus:
        """Put the staged version to use. Raises Conflict when something else, or nothing, is staged."""
        with self._swapping:
            if self.status.state != "staged" or (self._staged_run, self.status.staged_version) != (run_id, version):
                staged = f"version {self.status.staged_version} of run {self._staged_run}"
                found = staged if self.status.state == "staged" else "nothing"
                raise Conflict(f"commit of version {version} of run {run_id}: {found} is staged; stage it first")
            assert self.idle is not None
            started = time.monotonic()
            for name, parameter in self.live.items():
                parameter.data, self.idle[name] = self.idle[name], parameter.data
            self.status.version, self.status.run_id = version, run_id
            self.status.state, self.status.staged_version = "idle", None
            self.status.commit_seconds = time.monotonic() - started
            return msgspec.structs.replace(self.status)

    def _refused(self, manifest: Manifest, error: Exception) -> str:
        self.status.state = "failed"
        self.status.error = f"version {manifest.version} of run {manifest.run_id} refused: {error}"
        return self.status.error

    def _check(self, manifest: Manifest) -> None:
        if manifest.model_fingerprint != self.fingerprint:
            raise Conflict(
                f"it is of a model with fingerprint {manifest.model_fingerprint}, this server's is {self.fingerprint}"
            )
        faults = manifest_faults(manifest)
        given = {tensor.name: tensor.shape for tensor in manifest.tensors}
        faults += [f"tensor {name!r} is missing" for name in self.live.keys() - given.keys()]
        faults += [f"tensor {name!r} is unknown here" for name in given.keys() - self.live.keys()]
        faults += [
            f"tensor {name!r} has shape {list(shape)}, here {list(self.live[name].shape)}"
            for name, shape in given.items()
            if name in self.live and tuple(self.live[name].shape) != tuple(shape)
        ]
        if faults:
            raise Conflict("; ".join(faults[:3]) + (f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""))
