"""The compiled kernels against what they stand for in float64, in every build that this processor can run."""

import itertools
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from outrider.server.torch_engine import kernels
from outrider.server.torch_engine.cache import SlotCache
from outrider.server.torch_engine.fusion import FusedRotary, fuse, fuse_norms
from outrider.server.torch_engine.token_attention import TokenAttention
from tests.server.cores import Bench, reference
from tests.server.models import CONFIGS
from tests.server.test_core import assert_greedy_as_generate

_LEVELS = ("DEFAULT", "AVX2", "AVX512")
_PRESENT = _LEVELS[: 1 + _LEVELS.index(torch.backends.cpu.get_cpu_capability())]


@pytest.fixture(params=_PRESENT)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    kernels.library.cache_clear()
    if kernels.library() is None and shutil.which("cc") is None:
        pytest.skip("this machine has no C compiler")
    assert kernels.library() is not None, f"{request.param}: not built"
    yield
    kernels.library.cache_clear()


def expected(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None, softcap: float | None
) -> torch.Tensor:
    """Attention of queries [heads, groups, size] over [heads, positions, size], of which they are the last."""
    first = max(0, keys.shape[1] - window) if window else 0
    scores = 0.3 * torch.einsum("hgd,hpd->hgp", queries.double(), keys[:, first:].double())
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("hgp,hpd->hgd", scores.softmax(-1), values[:, first:].double())


@pytest.mark.parametrize(("size", "groups", "window", "softcap"), [
    (32, 2, None, None), (16, 1, None, None), (48, 3, 5, None), (64, 2, 40, 20.0), (128, 7, None, 30.0),
])  # fmt: skip
def test_attention(build: None, size: int, groups: int, window: int | None, softcap: float | None) -> None:
    """Sequences of many lengths grow token by token and in chunks; a slot's neighbours and what lies behind its end
    are not looked at."""
    torch.manual_seed(0)
    heads, room, lengths = 2, 96, [1, 2, 15, 16, 17, 31, 32, 33, 47, 64, 95]
    slots = len(lengths)
    keys, values = (
        torch.full((slots, heads, room // 16, size, 16), torch.nan),
        torch.full((slots, heads, room, size), torch.nan),
    )
    queries = torch.randn(slots, room, heads, groups, size) * 2
    all_keys, all_values = torch.randn(slots, room, heads, size), torch.randn(slots, room, heads, size)
    for chunk in (lambda n: range(n - 1), lambda n: range(n - 1, n)):  # prompts, and then one token each
        tokens = [(slot, position) for slot, length in enumerate(lengths) for position in chunk(length)]
        rows = torch.tensor(tokens).T
        out = torch.zeros(len(tokens), heads, groups, size)
        where, at = rows[0].contiguous(), rows[1].contiguous()
        inputs = [tensor[where, at].contiguous() for tensor in (queries, all_keys, all_values)]
        for share in (range(1), range(1, 2)):
            kernels.attend(*inputs, keys, values, where, at, window, 0.3, softcap, share, out)
        for (slot, position), found in zip(tokens, out, strict=True):
            own = (tensor[slot, : position + 1].transpose(0, 1) for tensor in (all_keys, all_values))
            torch.testing.assert_close(
                found.double(), expected(queries[slot, position], *own, window, softcap), rtol=1e-4, atol=1e-5
            )


def test_what_is_not_finite_stays_so(build: None) -> None:
    """A diverged model must be seen, in the sequence it is in and in no other."""
    keys, values = torch.zeros(2, 1, 4, 16, 16), torch.zeros(2, 1, 64, 16)
    inputs = [torch.ones(4, 1, 1, 16), torch.ones(4, 1, 16), torch.ones(4, 1, 16)]
    inputs[1][0] = torch.nan
    slots, positions, out = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), torch.zeros(4, 1, 1, 16)
    kernels.attend(*inputs, keys, values, slots, positions, None, 1.0, None, range(1), out)
    assert out[:2].isnan().all()
    assert out[2:].eq(1.0).all()


def test_threads_change_nothing() -> None:
    """Heads are shared out among them."""
    config = CONFIGS["mistral"]
    cache = SlotCache(config, 4, 64, 256, torch.float32, torch.device("cpu"), blocked=True)
    cache.resize(64, 0)
    queries, new, results = torch.randn(4, 4, 1, 32), torch.randn(2, 4, 4, 32), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            layout = TokenAttention(cache).layout(torch.arange(4), torch.tensor([0, 0, 0, 0]))
            results.append(torch.zeros_like(queries))
            layout.attend(1, queries, new[0], new[1], None, None, 1.0, results[-1])
    finally:
        torch.set_num_threads(before)
    assert all(result.equal(results[0]) for result in results)
    assert results[0].squeeze(2).equal(new[1])


@pytest.mark.parametrize("kind", [Qwen3RMSNorm, Gemma3RMSNorm])
def test_norms(build: None, kind: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    for size, rows in itertools.product((1, 8, 16, 40, 256), (1, 5)):
        theirs, ours = kind(size, eps=1e-6), kind(size, eps=1e-6)
        with torch.no_grad():
            theirs.weight.normal_()
            ours.weight.copy_(theirs.weight)
        assert fuse_norms(ours) == 1
        x = torch.randn(2, 3, rows, size).transpose(1, 2)
        with torch.inference_mode():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
            x[0, 0, 0, 0] = torch.nan
            assert ours(x)[0, 0, 0].isnan().all()
            assert not ours(x)[0, 0, 1:].isnan().any()


class CenteredRMSNorm(nn.Module):
    """Called so, and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(16)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, (16,), self.weight, eps=self.eps)


def test_a_norm_of_another_kind_is_left_alone() -> None:
    norm = CenteredRMSNorm()
    assert fuse_norms(norm) == 0
    x = torch.randn(2, 16)
    torch.testing.assert_close(norm(x), nn.functional.layer_norm(x, (16,), eps=1e-6))


def test_without_a_compiler(random_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch does it all, and the log says what is missing."""
    said: list[str] = []
    monkeypatch.setattr(kernels.log, "warning", lambda text, *arguments: said.append(text % arguments))
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels.py"))
    kernels.library.cache_clear()
    try:
        bench = Bench(random_model)
        assert ["no C compiler" in text for text in said] == [True]
        assert_greedy_as_generate(bench, random_model)
    finally:
        monkeypatch.undo()
        kernels.library.cache_clear()


def test_rotary_embeddings(build: None, random_model: Path) -> None:
    """The fused one is used in inference mode, and the model's own in training."""
    model = reference(random_model)
    module = sys.modules[type(model).__module__]
    before = module.apply_rotary_pos_emb
    fuse(model)
    fused = module.apply_rotary_pos_emb
    module.apply_rotary_pos_emb = before
    assert isinstance(fused, FusedRotary)
    assert not isinstance(fused.own, FusedRotary)
    q, k = torch.randn(1, 7, 4, 32).transpose(1, 2), torch.randn(1, 2, 7, 32)
    angles = torch.randn(1, 7, 16).repeat(1, 1, 2)
    with torch.inference_mode():
        ours, theirs = (function(q, k, angles.cos(), angles.sin()) for function in (fused, fused.own))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    q.requires_grad_()
    rotated, _ = fused(q, k, angles.cos(), angles.sin())
    rotated.sum().backward()
    assert q.grad is not None


def test_a_rotary_embedding_of_another_kind_is_left_alone() -> None:
    module = types.ModuleType("modeling_other")
    module.apply_rotary_pos_emb = lambda q, k, cos, sin: (q * cos, k * cos)  # type: ignore[attr-defined]
    sys.modules["modeling_other"] = module
    try:
        kind = type("Other", (nn.Module,), {"__module__": "modeling_other"})
        fuse(kind())
        assert not isinstance(module.apply_rotary_pos_emb, FusedRotary)
    finally:
        del sys.modules["modeling_other"]
