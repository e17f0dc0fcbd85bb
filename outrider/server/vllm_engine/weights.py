"""Published versions on their way to vLLM's workers: where the bytes are, and whether they are the right ones."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from outrider.contract.manifest import Manifest
from outrider.server.engine import Conflict
from outrider.server.vllm_engine.messages import Part, StageOrder, TensorSource, write_order
from outrider.server.weight_state import WeightState
from outrider.weights.buffers import BufferLayout, HostBuffer
from outrider.weights.checker import Checker
from outrider.weights.checksums import FetchError
from outrider.weights.fetch import fetch_tensors, on_this_host


class VllmWeights(WeightState):
    """Published on this host, workers copy a version from where it lies, and it is verified when they have. From
    another host it is fetched and verified first, once for all workers, into memory of this process.

    :meth:`order` and :meth:`verify` may run on any thread, one call at a time.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, fingerprint: str, key: str) -> None:
        """dtype: of the serving weights. key: under which a trainer on another host serves its own."""
        super().__init__(shapes, fingerprint)
        self._layout, self._key = BufferLayout(shapes, dtype), key
        self._buffer: HostBuffer | None = None
        self._checker = Checker()

    def order(self, manifest: Manifest, number: int, directory: Path) -> Path:
        """Check the manifest, and write down what workers are to copy. Raises Conflict."""
        try:
            self.check(manifest)
            if on_this_host(manifest):
                sources = [_in_place(manifest, index) for index in range(len(manifest.tensors))]
                check_lengths(manifest)
            else:
                sources = self._fetched(manifest)
        except (Conflict, FetchError) as error:
            raise Conflict(self.refuse(manifest, error)) from error
        except Exception as error:  # such as memory that does not suffice
            self.refuse(manifest, error)
            raise
        return write_order(directory, StageOrder(number, manifest.version, tuple(sources)))

    def verify(self, manifest: Manifest) -> None:
        """Whether what workers have copied is what was published. Raises Conflict."""
        if not on_this_host(manifest) and self._buffer is not None:
            return  # verified when it was fetched
        try:
            self._checker.check(manifest)
        except FetchError as error:
            raise Conflict(self.refuse(manifest, error)) from error

    def close(self) -> None:
        """Let the buffer go, and the process that verifies."""
        self._checker.close()
        if self._buffer is not None:
            self._buffer.close()

    def _fetched(self, manifest: Manifest) -> list[TensorSource]:
        layout = self._layout
        if self._buffer is None:
            self._buffer = HostBuffer(layout.length)
        fetch_tensors(manifest, layout.tensors(self._buffer), self._key)
        dtype, path = str(layout.dtype).removeprefix("torch."), self._buffer.path
        return [
            TensorSource(name, dtype, layout.shapes[name], (Part(path, offset, layout.nbytes(name)),))  # type: ignore[arg-type]
            for name, offset in layout.offsets.items()
        ]


def _in_place(manifest: Manifest, index: int) -> TensorSource:
    tensor = manifest.tensors[index]
    parts = tuple(Part(manifest.segments[p.segment].path, p.offset, p.length) for p in tensor.pieces)
    return TensorSource(tensor.name, tensor.dtype, tensor.shape, parts)


def check_lengths(manifest: Manifest) -> None:
    """Raises FetchError for a segment that is shorter than its manifest says."""
    for segment in manifest.segments:
        size = Path(segment.path).stat().st_size
        if size < segment.length:
            raise FetchError(f"segment {segment.path}: it has {size} bytes, the manifest says {segment.length}")


def tensor_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of the Hugging Face model, without making it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
