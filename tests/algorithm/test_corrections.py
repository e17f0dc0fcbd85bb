"""Corrections against loops over single tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.algorithm.corrections import logprob_gap, rollout_correction

MODES = ["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

# sequences of (old, rollout) log-probabilities
pairs = st.tuples(st.floats(-5, 0), st.floats(-5, 0))
batches = st.lists(st.lists(pairs, min_size=1, max_size=5), min_size=1, max_size=5)


def reference(batch: list[list[tuple[float, float]]], mode: str, threshold: float) -> list[float]:
    weights = []
    for tokens in batch:
        rhos = [math.exp(old - rollout) for old, rollout in tokens]
        geometric_mean = math.prod(rhos) ** (1 / len(rhos))
        for rho in rhos:
            value = geometric_mean if mode.startswith("sequence") else rho
            if mode == "none":
                weights.append(1.0)
            elif mode.endswith("truncate"):
                weights.append(min(value, threshold))
            else:
                weights.append(value if value <= threshold else 0.0)
    return weights


def flatten(batch: list[list[tuple[float, float]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flat = torch.tensor([pair for tokens in batch for pair in tokens], dtype=torch.float64).reshape(-1, 2)
    sequence = torch.tensor([index for index, tokens in enumerate(batch) for _ in tokens], dtype=torch.int64)
    return flat[:, 0], flat[:, 1], sequence


@pytest.mark.parametrize("mode", MODES)
# Not a round number: a sequence whose ρ equals C to the last bit may fall on either side of a mask.
@settings(deadline=None)
@given(batch=batches, threshold=st.sampled_from([0.51234567, 2.01234567]))
def test_corrections_follow_the_formula(mode: str, batch, threshold: float) -> None:
    old, rollout, sequence = flatten(batch)
    weights = rollout_correction(
        old_logprobs=old.requires_grad_(),
        rollout_logprobs=rollout,
        sequence=sequence,
        num_sequences=len(batch),
        mode=mode,
        threshold=threshold,
    )
    assert not weights.requires_grad
    torch.testing.assert_close(weights, torch.tensor(reference(batch, mode, threshold), dtype=torch.float64))


@pytest.mark.parametrize("mode", MODES)
def test_the_same_policy_needs_no_correction(mode: str) -> None:
    logprobs = torch.tensor([-0.5, -1.0, -2.0])
    weights = rollout_correction(
        old_logprobs=logprobs,
        rollout_logprobs=logprobs.clone(),
        sequence=torch.tensor([0, 0, 1]),
        num_sequences=2,
        mode=mode,
        threshold=2.0,
    )
    torch.testing.assert_close(weights, torch.ones(3))


@pytest.mark.parametrize(("mode", "expected"), [("token_truncate", 2.0), ("token_mask", 0.0)])
def test_a_token_impossible_for_the_sampler_stays_finite(mode: str, expected: float) -> None:
    weights = rollout_correction(
        old_logprobs=torch.tensor([0.0]),
        rollout_logprobs=torch.tensor([-1000.0]),
        sequence=torch.tensor([0]),
        num_sequences=1,
        mode=mode,
        threshold=2.0,
    )
    assert weights.tolist() == [expected]


@pytest.mark.parametrize("mode", MODES)
def test_no_tokens_give_no_weights(mode: str) -> None:
    empty = torch.zeros(0)
    weights = rollout_correction(
        old_logprobs=empty,
        rollout_logprobs=empty,
        sequence=torch.zeros(0, dtype=torch.int64),
        num_sequences=0,
        mode=mode,
        threshold=2.0,
    )
    assert weights.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 0.0}, "must be positive"),
        ({"threshold": math.nan}, "must be positive"),
        ({"mode": "token"}, "choose none, token_truncate"),
        ({"rollout_logprobs": torch.zeros(3)}, r"both must be \[tokens\]"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {
        "old_logprobs": torch.zeros(2),
        "rollout_logprobs": torch.zeros(2),
        "sequence": torch.tensor([0, 1]),
        "num_sequences": 2,
        "mode": "token_truncate",
        "threshold": 2.0,
    }
    with pytest.raises(ValueError, match=message):
        rollout_correction(**(arguments | change))


def test_gap_by_hand() -> None:
    gap = logprob_gap(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -1.0, -3.0]))
    assert (gap.abs_sum.item(), gap.abs_max.item(), gap.k1_sum.item(), gap.tokens) == (1.5, 1.0, 0.5, 3)


def test_gap_of_no_tokens_is_zero() -> None:
    gap = logprob_gap(torch.zeros(0), torch.zeros(0))
    assert (gap.abs_sum.item(), gap.abs_max.item(), gap.k1_sum.item(), gap.tokens) == (0.0, 0.0, 0.0, 0)
