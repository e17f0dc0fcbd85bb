from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.contract.errors import UserError
from outrider.trainer.flat import collate_flat, form_flat
from outrider.trainer.packing import Flat, length_of, share_out
from tests.server.models import save_model
from tests.trainer.build import make_policy, one_a_row, random_samples, sample

CPU = torch.device("cpu")


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=60),
    st.integers(1, 9),
    st.one_of(st.none(), st.integers(20, 200)),
    st.integers(1, 4),
    st.sampled_from([1.0, 30.0, 1e9]),
)
def test_every_rollout_has_a_place_within_the_budget(
    lengths: list[int], rollouts: int, max_tokens: int | None, ranks: int, break_even: float
) -> None:
    samples = [sample([5], list(range(length))) for length in lengths]
    formed = form_flat(samples, rollouts, max_tokens, ranks, break_even)
    assert sorted(index for batch in formed for [index] in batch) == list(range(len(samples)))
    for batch in formed:
        tokens = sum(length_of(samples[index]) for [index] in batch)
        assert len(batch) == 1 or (len(batch) <= rollouts if max_tokens is None else tokens <= max_tokens)
    assert len(formed) % ranks == 0 or len(formed) == len(samples)
    least = -(-sum(lengths) // max_tokens) if max_tokens else -(-len(lengths) // rollouts)
    assert len(formed) <= -(-2 * least // ranks) * ranks + sum(length > (max_tokens or 99) // 2 for length in lengths)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_realistic_mix_fills_its_micro_batches_and_they_cost_alike(ranks: int) -> None:
    """Lengths as of reasoning rollouts: many short ones and a long tail, which attention makes dearer than their number
    of tokens says."""
    draw = np.random.default_rng(0)
    lengths = np.minimum(draw.lognormal(7.5, 0.8, 512), 12000).astype(int)
    samples = [sample([1] * 100, [2] * int(length)) for length in lengths]
    break_even = 6 * 1024.0
    formed = form_flat(samples, 8, 16384, ranks, break_even)
    tokens = sum(map(length_of, samples))
    assert len(formed) <= -(-tokens // 16384) + 2 * ranks

    def cost(rows: list[list[int]] | None) -> float:
        lengths = [length_of(samples[index]) for [index] in rows or ()]
        return sum(length + length**2 / break_even for length in lengths)

    shared = share_out(formed, samples, ranks, break_even)
    of = np.array([[cost(rows) for rows in of_rank] for of_rank in shared])
    assert of.sum(axis=1).max() <= 1.03 * of.sum(axis=1).min()
    # In each round the ranks wait for the slowest of them.
    assert ranks * of.max(axis=0).sum() <= 1.03 * of.sum()


def test_the_tensors_of_a_flat_micro_batch() -> None:
    samples = [sample([7, 8], [9, 10, 11], mask=[1, 0, 1]), sample([5], [6])]
    micro = collate_flat(samples, CPU)
    assert micro.input_ids.shape == (1, 128)
    assert micro.input_ids[0, :6].tolist() == [7, 8, 9, 10, 5, 0]
    assert micro.positions[0, :8].tolist() == [0, 1, 2, 3, 0, 0, 1, 2]
    assert isinstance(micro.layout, Flat)
    assert micro.layout.bounds.tolist() == [0, 4, 5, 128]
    assert micro.layout.longest >= 123
    assert micro.where.tolist() == [1, 3, 4]
    assert micro.targets.tolist() == [9, 11, 6]
    assert micro.sequence.tolist() == [0, 0, 1]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_log_probabilities_and_gradients_are_those_of_padded_rows(kind: str, tmp_path: Path) -> None:
    """Sliding windows, grouped heads and all: mistral and gemma3 have windows shorter than the longest rollout."""
    path = save_model(kind, tmp_path)
    samples = random_samples(12, seed=3, masks=True)
    samples.append(sample(list(range(5, 25)), list(range(30, 45))))
    rows, flat = make_policy(path), make_policy(path, attn_impl="varlen")
    assert (rows.flat, flat.flat) == (False, True)
    found = []
    for policy, micro in ((rows, one_a_row(samples)), (flat, collate_flat(samples, CPU))):
        logprobs = policy.logprobs(micro)
        weights = torch.linspace(-1, 1, len(logprobs))
        (logprobs * weights).sum().backward()
        found.append((logprobs.detach(), {n: p.grad.clone() for n, p in policy.model.named_parameters()}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_model_whose_attention_caps_its_scores_cannot_be_flat(tmp_path: Path) -> None:
    path = save_model("gemma2", tmp_path)
    with pytest.raises(UserError, match=r"--attn_impl varlen: Gemma2ForCausalLM .* give --attn_impl sdpa"):
        make_policy(path, attn_impl="varlen")
    assert not make_policy(path).flat
