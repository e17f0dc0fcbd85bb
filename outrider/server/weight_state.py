"""Which version a server holds and which one it is taking up: the part that every engine shares."""

import threading
import time

import msgspec

from outrider.contract.control import WeightStatus
from outrider.contract.manifest import Manifest, manifest_faults
from outrider.server.engine import Conflict


class WeightState:
    """The weight status of a server, and the rules by which it changes. shapes: name → shape of every tensor that a
    manifest has to bring. fingerprint: of the model that it has to be of."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], fingerprint: str) -> None:
        self.shapes, self.fingerprint = shapes, fingerprint
        self.status = WeightStatus(version=0, run_id="", state="idle")
        self._staged_run = ""
        self._started = 0.0
        # A stage must not begin to fill the idle buffer while a commit is making it the live one.
        self.swapping = threading.Lock()

    def begin(self) -> None:
        """A stage begins."""
        with self.swapping:
            self.status.state, self.status.staged_version, self.status.error = "staging", None, None
        self._started = time.monotonic()

    def check(self, manifest: Manifest) -> None:
        """Raises Conflict when ``manifest`` is for another model or contradicts itself."""
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

    def staged(self, manifest: Manifest) -> WeightStatus:
        """Everybody holds the version."""
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
        """Everybody has switched. seconds: that the slowest stood still for it."""
        self.status.version, self.status.run_id = version, run_id
        self.status.state, self.status.staged_version = "idle", None
        self.status.commit_seconds = seconds
        return msgspec.structs.replace(self.status)

    def unstage(self) -> None:
        """Forget what is staged: not everybody holds it."""
        if self.status.state == "staged":
            self.status.state, self.status.staged_version = "idle", None

    def refuse(self, manifest: Manifest, error: Exception) -> str:
        """The stage has failed. Returns the reason in words."""
        self.status.state = "failed"
        self.status.error = f"version {manifest.version} of run {manifest.run_id} refused: {error}"
        return self.status.error
