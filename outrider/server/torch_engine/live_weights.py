"""The weights that a replica computes with, and the next ones beside them."""

import mmap

import torch
from torch import Tensor, nn

from outrider.server.torch_engine.messages import Stage


class LiveWeights:
    """Two sets of weights of one model. Staging fills the idle set while the other is in use. Committing swaps the
    storage of every parameter on the CPU, which takes no copying; on CUDA it copies, at the memory's speed, because
    recorded graphs read weights from where they lay.

    On the CPU, float32 weights of linear layers lie transposed in memory (their shape stays): a product of a few rows
    with them is then a quarter faster.
    """

    def __init__(self, model: nn.Module) -> None:
        self.live: dict[str, nn.Parameter] = dict(model.named_parameters())
        first = next(model.parameters())
        self._swaps = first.device.type == "cpu"
        transpose = self._swaps and first.dtype == torch.float32
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
        self._transposed = {
            name for name, p in self.live.items() if transpose and id(p) in linear and id(p) not in embeddings
        }
        self._idle: dict[str, Tensor] = {}
        for name in self._transposed:
            self.live[name].data = self._empty_like(name).copy_(self.live[name].data)

    def stage(self, stage: Stage) -> None:
        """Copy a version from its host buffer into the idle set. May run on any thread, one call at a time."""
        if not self._idle:
            self._idle = {name: self._empty_like(name) for name in self.live}
        with open(stage.path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), stage.length, access=mmap.ACCESS_COPY)
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
        for place in stage.places:
            target = self._idle[place.name]
            length = target.numel() * target.element_size()
            source = whole[place.offset : place.offset + length].view(target.dtype).view(place.shape)
            target.copy_(source)

    @torch.no_grad()
    def commit(self) -> None:
        """Put the idle set to use. Between two steps only."""
        if not self._swaps:
            torch._foreach_copy_([p.data for p in self.live.values()], [self._idle[name] for name in self.live])
            return
        for name, parameter in self.live.items():
            parameter.data, self._idle[name] = self._idle[name], parameter.data

    def _empty_like(self, name: str) -> Tensor:
        parameter = self.live[name]
        if name in self._transposed:
            return torch.empty(parameter.shape[::-1], dtype=parameter.dtype).t()
        return torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
