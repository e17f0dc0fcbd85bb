"""A second set of weights in a vLLM worker: loaded while the first one generates, and swapped in between two steps.

The shadow is another instance of the worker's own model class, with parameters as they are after sharding and fusing:
its ``load_weights`` takes Hugging Face's names and copies this rank's shard and nothing else. So a worker needs memory
for one more copy of its own shard, not of the model, and a commit has nothing left to compute.
"""

import copy
import mmap
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from outrider.server.vllm_engine.copies import CHUNK, CopyPlan, Published, Recorder
from outrider.server.vllm_engine.messages import TensorSource
from outrider.weights.buffers import pin, unpin
from outrider.weights.checksums import is_gone

#: Path, inode, size, and whether it is to be pinned.
_File = tuple[str, int, int, bool]


#: Modules that compute something from their weights after loading, or rearrange them in place.
_DERIVING = ("FusedMoE", "SharedFusedMoE", "MLAAttention", "MultiHeadLatentAttention")


class Unsupported(Exception):
    """This model cannot take weights while it runs."""


class Shadow:
    """The second set of a worker's weights."""

    def __init__(self, worker: Any, host: bool, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]]) -> None:
        """host: it is kept in host memory, for a GPU that has no room for it. dtype, shapes: of what will be published.
        Raises Unsupported."""
        self._runner = worker.model_runner
        self.live: nn.Module = self._runner.get_model()
        self.device = torch.device(worker.device)
        on_cpu = self.device.type == "cpu"
        self.model: Any = _another_instance(worker.vllm_config, torch.device("cpu") if host else self.device)
        self._sources = Sources(pinned=not on_cpu and not host)
        self._names = {name for name, _ in self.model.named_parameters()}
        if host and not on_cpu:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.pin_memory()
        #: Whether the weights in use, and those that are staged, are finite numbers.
        self.finite, self._staged_finite = True, True
        self._stream = None if on_cpu else torch.cuda.Stream(self.device)
        self.swap: _Copies | _Modules = _Modules(self.live, self.model) if on_cpu else _Copies(self.live, self.model)
        self._layout = {name: (dtype, shape) for name, shape in shapes.items()}
        #: How versions of this layout are copied; None where vLLM has to load them.
        self._plan = self._record()
        # CUDA loads these kernels now, and not beside the engine's steps.
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            all_finite(self.model.parameters())

    def load(self, tensors: tuple[TensorSource, ...]) -> bool:
        """Fill the shadow, on any thread but that of the engine's steps. Returns whether that was done by known copies,
        and not by vLLM's own loading. Raises Unsupported, OSError."""
        layout = {source.name: (getattr(torch, source.dtype), source.shape) for source in tensors}
        known = self._plan if layout == self._layout else None
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            published = self._sources.of(tensors, pinned=known is not None)
            if known is not None:
                known.run(published)
            else:
                self._load_by_vllm((name, tensor.whole()) for name, tensor in published.items())
            self._staged_finite = all_finite(self.model.parameters())
            self.swap.prepare()
        if self._stream is not None:
            self._stream.synchronize()
        return known is not None

    def _record(self) -> CopyPlan | None:
        """See what the model does with tensors that have nothing in them: memory that is not touched."""
        recorder = Recorder(self.model.parameters())
        with torch.inference_mode(), recorder:
            self._load_by_vllm(
                (name, recorder.source(name, torch.empty(shape, dtype=dtype)))
                for name, (dtype, shape) in self._layout.items()
            )
        return recorder.plan()

    def _load_by_vllm(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        loaded = self.model.load_weights(tensors)
        missing = self._names - set(loaded) if loaded is not None else set()
        if missing:
            raise Unsupported(f"the published tensors do not reach {sorted(missing)[:3]} of vLLM's model")

    def commit(self) -> bool:
        """Put the shadow in force. On the thread of the engine's steps, between two of them. Returns whether keys and
        values have been cleared: what weights that are not finite have left in the cache is not a number, and blocks
        of it would spoil whatever is written beside it later."""
        clear = not self.finite
        with torch.inference_mode():
            self.swap.commit()
            if clear:
                for cache in self._caches:
                    cache.zero_()
        self.finite = self._staged_finite
        return clear

    @property
    def _caches(self) -> list[Tensor]:
        found: list[Tensor] = []
        for cache in self._runner.kv_caches:
            found += cache if isinstance(cache, list | tuple) else [cache]
        return found


def all_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether no value is infinite or not a number: the least and the greatest would not be finite either. So memory is
    needed for these alone, and not for a copy of the largest parameter."""
    ends = [torch.isfinite(torch.stack(torch.aminmax(each))).all() for each in parameters if each.numel()]
    return bool(torch.stack(ends).all()) if ends else True


def _another_instance(config: Any, device: torch.device) -> nn.Module:
    """The model once more, with weights of its own and without a place in the worker's forward context."""
    from vllm.config import CompilationMode
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = copy.copy(config)
    config.compilation_config = compilation = copy.copy(config.compilation_config)
    # Attention layers enter themselves there under their names, which the model in use has taken.
    compilation.static_forward_context = {}
    compilation.static_all_moe_layers = []
    compilation.mode = CompilationMode.NONE
    with set_default_torch_dtype(config.model_config.dtype), device:
        return initialize_model(vllm_config=config, model_config=config.model_config).requires_grad_(False)


class _Copies:
    """On a GPU a commit copies, at the memory's speed: recorded graphs hold on to the addresses of the weights."""

    def __init__(self, live: nn.Module, shadow: nn.Module) -> None:
        for name, module in live.named_modules():
            if type(module).__name__.startswith(_DERIVING):
                raise Unsupported(
                    f"{name!r} is a {type(module).__name__}, of which vLLM keeps more than what it loads: mixtures of "
                    "experts and latent attention cannot take new weights while they run"
                )
        targets, sources = dict(live.named_parameters()), dict(shadow.named_parameters())
        for name in targets.keys() | sources.keys():
            there, here = targets.get(name), sources.get(name)
            if there is None or here is None or (there.shape, there.dtype) != (here.shape, here.dtype):
                raise Unsupported(
                    f"vLLM keeps {name!r} in another form than it loads it (is it quantized, or a mixture of experts?)"
                )
        self.targets = [targets[name].data for name in targets]
        self.sources = [sources[name].data for name in targets]
        # What CUDA loads at the first copy of this kind it loads now, and not while steps wait for the first commit.
        with torch.inference_mode():
            torch._foreach_copy_(self.sources, self.targets, non_blocking=True)

    def prepare(self) -> None:
        """There is nothing more to do than to load."""

    def commit(self) -> None:
        """Takes effect in the order of the stream in which the steps run."""
        torch._foreach_copy_(self.targets, self.sources, non_blocking=True)


class _Modules:
    """On a CPU vLLM packs the weights of linear layers for their kernels, and modules keep what they packed. So new
    ones are packed into copies of the modules, and a commit exchanges what the modules keep."""

    def __init__(self, live: nn.Module, shadow: nn.Module) -> None:
        modules = dict(live.named_modules())
        self._pairs = [(modules[name], module) for name, module in shadow.named_modules() if module._parameters]
        self._prepared: list[tuple[nn.Module, dict[str, Any]]] = []

    def prepare(self) -> None:
        """Pack what has been loaded."""
        clones: dict[int, nn.Parameter] = {}  # parameters that two modules share go on being shared
        self._prepared = []
        for live, loaded in self._pairs:
            module = copy.copy(loaded)
            module._parameters = {
                name: None if parameter is None else clones.setdefault(id(parameter), _clone(parameter))
                for name, parameter in loaded._parameters.items()
            }
            method = getattr(module, "quant_method", None)
            if method is not None and hasattr(method, "process_weights_after_loading"):
                method.process_weights_after_loading(module)
            news = {key: value for key, value in vars(module).items() if vars(loaded).get(key) is not value}
            self._prepared.append((live, news))

    def commit(self) -> None:
        """A matter of some dictionaries."""
        for live, news in self._prepared:
            vars(live).update(news)
        self._prepared = []


def _clone(parameter: nn.Parameter) -> nn.Parameter:
    clone = nn.Parameter(parameter.data.clone(), requires_grad=False)
    vars(clone).update(vars(parameter))
    return clone


class Sources:
    """Published bytes, mapped from the files in which they lie, and for as long as these are there. pinned: for copies
    that go to a GPU and not to host memory."""

    def __init__(self, pinned: bool) -> None:
        self._may_pin = pinned
        self._files: dict[_File, Tensor] = {}
        self._pinned: set[_File] = set()

    def of(self, tensors: tuple[TensorSource, ...], pinned: bool) -> dict[str, Published]:
        """By name. pinned: the memory is registered with CUDA where that is to be had, in pieces of CHUNK, across whose
        ends no copy goes that is not known beforehand. Raises OSError."""
        for file in [file for file in self._files if is_gone(*file[:2])]:
            self._forget(file)
        paths = {part.path for source in tensors for part in source.parts}
        whole = {path: self._map(path, pinned and self._may_pin) for path in paths}
        return {
            source.name: Published(
                source.dtype,
                source.shape,
                [
                    (part.offset, whole[part.path][part.offset : part.offset + part.length])
                    for part in source.parts
                    if part.length
                ],
            )
            for source in tensors
        }

    def _map(self, path: str, pinned: bool) -> Tensor:
        status = os.stat(path)
        key = (path, status.st_ino, status.st_size, pinned)
        if key not in self._files:
            with open(path, "r+b") as file:
                whole = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
            if pinned and pin(whole, CHUNK):
                self._pinned.add(key)
            self._files[key] = whole
        return self._files[key]

    def _forget(self, key: _File) -> None:
        whole = self._files.pop(key)
        if key in self._pinned:
            self._pinned.discard(key)
            unpin(whole, CHUNK)
