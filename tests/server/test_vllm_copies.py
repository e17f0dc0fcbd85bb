"""Copies that are recorded while a model loads its weights, and done again for another version."""

from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from outrider.server.vllm_engine import copies
from outrider.server.vllm_engine.copies import CopyPlan, Published, Recorder

SHAPES = {"norm": (8,), "q": (8, 8), "k": (4, 8), "o": (8, 8), "embed": (10, 8), "scale": ()}


class Fused(nn.Module):
    """Rank ``rank`` of two: q and k are one parameter, of which it has a half each; o has half of the columns; the
    vocabulary is padded."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        shapes = {"norm": (8,), "qk": (6, 8), "o": (8, 4), "embed": (6, 8), "scale": ()}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.full(shape, 9.0), requires_grad=False))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        rank = self.rank
        for name, weight in weights:
            if name == "q":
                self.qk.data.narrow(0, 0, 4).copy_(weight.narrow(0, 4 * rank, 4))
            elif name == "k":
                self.qk.data[4:].copy_(weight[2 * rank : 2 * rank + 2])
            elif name == "o":
                self.o.data.copy_(weight.narrow(1, 4 * rank, 4))
            elif name == "embed":
                mine = weight[6 * rank : 6 * rank + 6]
                self.embed.data[: len(mine)].copy_(mine)
                self.embed.data[len(mine) :].fill_(0)
            else:
                getattr(self, name).data.copy_(weight)


def version(seed: int) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=source) for name, shape in SHAPES.items()}


def recorded(model: nn.Module, load: Callable[[Iterable[tuple[str, Tensor]]], None]) -> CopyPlan | None:
    recorder = Recorder(model.parameters())
    with torch.inference_mode(), recorder:
        load((name, recorder.source(name, tensor)) for name, tensor in version(0).items())
    return recorder.plan()


def run(plan: CopyPlan, tensors: dict[str, Tensor], cuts: list[float]) -> None:
    """Published by ranks that have contiguous rows each. cuts: shares of the rows at which one's end."""
    sources = {}
    offset = 0
    for name, tensor in tensors.items():
        rows = tensor.reshape(len(tensor), -1) if tensor.ndim else tensor.reshape(1, 1)
        parts = []
        for part in rows.tensor_split(sorted(round(cut * len(rows)) for cut in cuts)):
            if len(part):
                parts.append((offset, part.contiguous().view(torch.uint8).flatten()))
                offset += part.nbytes + 4
        sources[name] = Published("float32", tuple(tensor.shape), parts)
        assert torch.equal(sources[name].whole(), tensor)
    with torch.inference_mode():
        plan.run(sources)


@pytest.mark.parametrize("chunk", [8, 40, copies.CHUNK])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("as_on_gpu", [False, True])
@settings(deadline=None)
@given(cuts=st.lists(st.floats(0, 1), max_size=3))
def test_the_same_as_loading(as_on_gpu: bool, rank: int, chunk: int, cuts: list[float]) -> None:
    model, expected = Fused(rank), Fused(rank)
    plan = recorded(model, model.load_weights)
    assert plan is not None
    expected.load_weights(version(1).items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "CHUNK", chunk)
        patch.setattr(copies, "_on_gpu", lambda target: as_on_gpu)
        run(plan, version(1), cuts)
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model, weight: model.o.data.copy_(2 * weight[:, :4]),
        lambda model, weight: model.o.data.copy_(weight.t()[:, :4]),
        lambda model, weight: model.o.data.copy_(weight[:, :4]).mul_(2),
        lambda model, weight: model.o.data.fill_(weight[0, 0].item()),
        lambda model, weight: model.o.data[1:].copy_(weight[1:, :4]),
        lambda model, weight: model.o.data.copy_(weight.flatten()[:32].view(8, 4)),
    ],
    ids=["computed", "transposed", "changed afterwards", "a value that Python saw", "a part", "another form"],
)
def test_what_is_no_plain_copy_is_not_taken_for_one(spoil: Callable[[Fused, Tensor], object]) -> None:
    model = Fused(0)

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            if name == "o":
                spoil(model, weight)
            else:
                model.load_weights([(name, weight)])

    assert recorded(model, load) is None
