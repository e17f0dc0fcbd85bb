"""The losses against the papers' formulas, written as loops over sequences and tokens in float64.

The reference shares nothing with the code under test: it has a batch of sequences of different lengths,
visits them one token after the other, and lets autograd differentiate what it did.
"""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outrider.algorithm.corrections import rollout_correction
from outrider.algorithm.losses import LossOutput, LossSpec, StepCounts, policy_loss

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo"]
LEVELS = ["token", "sequence"]
MAX_LENGTH = 7


@dataclass
class Batch:
    """Sequences of one optimizer step; every list has one entry, [length] or a number, for each sequence."""

    logprobs: list[Tensor]
    old: list[Tensor]
    ref: list[Tensor]
    correction: list[Tensor]
    advantages: list[float]

    def take(self, indices: list[int]) -> "Batch":
        return Batch(*([column[i] for i in indices] for column in vars(self).values()))


def make_batch(lengths: list[int], seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> list[Tensor]:
        return [torch.randn(n, generator=generator, dtype=torch.float64) * scale for n in lengths]

    logprobs = [-value.abs() for value in draw(1.0)]
    # Far enough from old that all four clipping cases and delta occur.
    return Batch(
        logprobs=logprobs,
        old=[a + b for a, b in zip(logprobs, draw(0.7), strict=True)],
        ref=[a + b for a, b in zip(logprobs, draw(0.5), strict=True)],
        correction=[value.abs() for value in draw(1.0)],
        advantages=(torch.randn(len(lengths), generator=generator, dtype=torch.float64) * 1.5).tolist(),
    )


def counts_of(batch: Batch) -> StepCounts:
    return StepCounts(sequences=len(batch.logprobs), tokens=sum(len(row) for row in batch.logprobs))


def reference_loss(batch: Batch, spec: LossSpec, corrected: bool) -> Tensor:
    """The whole step's loss, from the formulas alone."""
    upper = spec.epsilon if spec.epsilon_high is None else spec.epsilon_high
    per_sequence: list[Tensor] = []
    for i, logprobs in enumerate(batch.logprobs):
        length = len(logprobs)
        advantage = batch.advantages[i]
        mean_ratio = torch.exp(sum(logprobs[t] - batch.old[i][t] for t in range(length)) / length)
        total = torch.zeros((), dtype=torch.float64)
        for t in range(length):
            ratio = torch.exp(logprobs[t] - batch.old[i][t])
            if spec.importance_sampling_level == "sequence":
                ratio = mean_ratio
            first = ratio if spec.delta is None else min(ratio, torch.tensor(spec.delta, dtype=torch.float64))
            low = torch.tensor(1 - spec.epsilon, dtype=torch.float64)
            high = torch.tensor(1 + upper, dtype=torch.float64)
            second = low if ratio < low else high if ratio > high else ratio
            value = -min(first * advantage, second * advantage)
            if corrected:
                value = value * batch.correction[i][t]
            if spec.beta > 0:
                gap = batch.ref[i][t] - logprobs[t]
                value = value + spec.beta * (torch.exp(gap) - gap - 1)
            total = total + value
        per_sequence.append(total)
    lengths = [len(row) for row in batch.logprobs]
    if spec.loss_type == "grpo":
        return sum(total / length for total, length in zip(per_sequence, lengths, strict=True)) / len(lengths)
    if spec.loss_type == "dr_grpo":
        return sum(per_sequence) / (len(lengths) * spec.max_completion_length)
    return sum(per_sequence) / sum(lengths)


def flat(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.float64)


def loss_of(batch: Batch, spec: LossSpec, counts: StepCounts, corrected: bool) -> LossOutput:
    rows = batch.logprobs
    return policy_loss(
        logprobs=flat(rows),
        old_logprobs=flat(batch.old),
        advantages=torch.tensor(batch.advantages, dtype=torch.float64),
        sequence=torch.tensor([i for i, row in enumerate(rows) for _ in row], dtype=torch.int64),
        spec=spec,
        counts=counts,
        correction=flat(batch.correction) if corrected else None,
        ref_logprobs=flat(batch.ref) if spec.beta > 0 else None,
    )


def gradients(loss: Tensor, batch: Batch) -> Tensor:
    # The loops leave a sequence whose tokens are all clipped out of the graph: its gradient is 0.
    return flat(list(torch.autograd.grad(loss, batch.logprobs, materialize_grads=True)))


def with_gradient(batch: Batch) -> Batch:
    return replace(batch, logprobs=[row.clone().requires_grad_() for row in batch.logprobs])


def spec_of(loss_type: str, level: str, delta: float | None, beta: float, high: float | None) -> LossSpec:
    return LossSpec(
        loss_type=loss_type,
        importance_sampling_level=level,
        delta=delta,
        beta=beta,
        epsilon_high=high,
        max_completion_length=MAX_LENGTH,
    )


CASES = list(
    itertools.product(LOSS_TYPES, LEVELS, [None, 1.6], [0.0, 0.3], [None, 0.4], [False, True]),
)


@pytest.mark.parametrize(("loss_type", "level", "delta", "beta", "high", "corrected"), CASES)
def test_value_and_gradient_follow_the_formula(
    loss_type: str, level: str, delta: float | None, beta: float, high: float | None, corrected: bool
) -> None:
    spec = spec_of(loss_type, level, delta, beta, high)
    batch = with_gradient(make_batch([3, 1, 7, 5, 2, 4], seed=1))
    expected = reference_loss(batch, spec, corrected)
    actual = loss_of(batch, spec, counts_of(batch), corrected).loss
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(actual, batch), gradients(expected, batch), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("loss_type", "level"), itertools.product(LOSS_TYPES, LEVELS))
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_packing_and_order_change_nothing(loss_type: str, level: str, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    batch = with_gradient(make_batch(lengths, seed=data.draw(st.integers(0, 1000))))
    order = data.draw(st.permutations(range(len(lengths))))
    # Which micro-batch a sequence goes to; some stay empty, as on a rank that ran out of work.
    micro_batch = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    spec = spec_of(loss_type, level, delta=1.6, beta=0.1, high=0.3)
    counts = counts_of(batch)

    whole = loss_of(batch, spec, counts, corrected=True)
    parts = [
        loss_of(batch.take([i for i in order if micro_batch[i] == m]), spec, counts, corrected=True) for m in range(4)
    ]

    total = sum(part.loss for part in parts)
    torch.testing.assert_close(total, whole.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(total, batch), gradients(whole.loss, batch), rtol=1e-12, atol=1e-12)
    for name in ("clip_low_sum", "clip_high_sum", "kl_sum", "ratio_sum", "tokens"):
        added = sum(float(getattr(part, name)) for part in parts)
        assert added == pytest.approx(float(getattr(whole, name)), rel=1e-12)
    assert max(part.ratio_max.item() for part in parts) == pytest.approx(whole.ratio_max.item(), rel=1e-12)


def test_bnpo_is_dapo_over_the_whole_step() -> None:
    batch = make_batch([3, 5], seed=3)
    bnpo, dapo = (
        loss_of(batch, spec_of(t, "token", None, 0.0, None), counts_of(batch), False) for t in ("bnpo", "dapo")
    )
    assert bnpo.loss == dapo.loss


def test_on_policy_gradient_by_hand() -> None:
    """With old = logp the ratio is 1, and the gradient of dapo is −A / tokens."""
    logprobs = torch.tensor([-0.5, -1.0, -0.1], dtype=torch.float64, requires_grad=True)
    output = policy_loss(
        logprobs=logprobs,
        old_logprobs=logprobs.detach(),
        advantages=torch.tensor([2.0, -1.0]),
        sequence=torch.tensor([0, 0, 1]),
        spec=LossSpec(max_completion_length=8),
        counts=StepCounts(sequences=2, tokens=6),
    )
    output.loss.backward()
    assert output.loss.item() == pytest.approx(-(2.0 + 2.0 - 1.0) / 6)
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor([-2.0, -2.0, 1.0], dtype=torch.float64) / 6)


def test_clipped_tokens_are_counted_and_have_no_gradient() -> None:
    ratios = torch.tensor([0.5, 1.5, 0.5, 1.5, 1.0], dtype=torch.float64)
    logprobs = ratios.log().requires_grad_()
    output = policy_loss(
        logprobs=logprobs,
        old_logprobs=torch.zeros(5, dtype=torch.float64),
        advantages=torch.tensor([1.0, -1.0]),
        sequence=torch.tensor([0, 0, 1, 1, 1]),
        spec=LossSpec(max_completion_length=8),
        counts=StepCounts(sequences=2, tokens=5),
        ref_logprobs=torch.zeros(5, dtype=torch.float64),
    )
    output.loss.backward()
    assert (output.clip_low_sum.item(), output.clip_high_sum.item(), output.tokens) == (1, 1, 5)
    assert output.ratio_sum.item() == pytest.approx(5.0)
    assert output.ratio_max.item() == pytest.approx(1.5)
    # beta is 0: the distance to the reference is measured, not trained. k3 = 1/r + log r − 1.
    assert output.kl_sum.item() == pytest.approx((1 / ratios + ratios.log() - 1).sum().item())
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.5, 0.0, 0.0, 1.5, 1.0], dtype=torch.float64) / 5)
    assert not any(tensor.requires_grad for tensor in output[1:] if isinstance(tensor, Tensor))


@pytest.mark.parametrize(("loss_type", "level", "beta"), itertools.product(LOSS_TYPES, LEVELS, [0.0, 0.1]))
@pytest.mark.parametrize("counts", [StepCounts(sequences=4, tokens=9), StepCounts(sequences=0, tokens=0)])
def test_an_empty_micro_batch_is_an_anchored_zero(loss_type: str, level: str, beta: float, counts: StepCounts) -> None:
    parameter = torch.ones(3, requires_grad=True)
    logprobs = parameter.log_softmax(0)[:0]
    output = policy_loss(
        logprobs=logprobs,
        old_logprobs=logprobs.detach(),
        advantages=torch.zeros(0),
        sequence=torch.zeros(0, dtype=torch.int64),
        spec=spec_of(loss_type, level, 1.6, beta, None),
        counts=counts,
        correction=torch.zeros(0),
        ref_logprobs=torch.zeros(0),
    )
    assert output.loss.item() == 0.0
    assert (output.tokens, output.ratio_max.item()) == (0, 0.0)
    output.loss.backward()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [0.0, 0.0, 0.0]


def test_a_masked_token_with_an_astronomic_ratio_does_not_end_the_run() -> None:
    """float32 overflows at exp(89); infinity times a correction of zero would be NaN."""
    logprobs = torch.tensor([0.0, -1.0], requires_grad=True)
    old = torch.tensor([-200.0, -1.0])
    sequence = torch.tensor([0, 0])
    correction = rollout_correction(
        old_logprobs=torch.zeros(2),
        rollout_logprobs=torch.tensor([-300.0, 0.0]),
        sequence=sequence,
        num_sequences=1,
        mode="token_mask",
        threshold=2.0,
    )
    output = policy_loss(
        logprobs=logprobs,
        old_logprobs=old,
        advantages=torch.tensor([-1.0]),
        sequence=sequence,
        spec=LossSpec(max_completion_length=8),
        counts=StepCounts(sequences=1, tokens=2),
        correction=correction,
    )
    output.loss.backward()
    assert output.loss.item() == pytest.approx(0.5)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "gdpo"}, "choose one of grpo, bnpo, dr_grpo, dapo"),
        ({"importance_sampling_level": "sentence"}, "choose one of token, sequence"),
        ({"epsilon": -0.1}, "epsilon is -0.1"),
        ({"epsilon_high": -0.1}, "epsilon_high is -0.1"),
        ({"delta": 1.2}, "above 1 \\+ epsilon_high"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"max_completion_length": 0}, "at least 1"),
    ],
)
def test_contradictory_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSpec(**({"max_completion_length": 8} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_logprobs": None}, "load a reference model"),
        ({"old_logprobs": torch.zeros(3)}, "old has shape"),
        ({"correction": torch.zeros(2, 1)}, "correction has shape"),
        ({"logprobs": torch.zeros(1, 2)}, "expected one dimension"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    arguments = {
        "logprobs": torch.zeros(2),
        "old_logprobs": torch.zeros(2),
        "advantages": torch.zeros(1),
        "sequence": torch.tensor([0, 0]),
        "spec": LossSpec(max_completion_length=8, beta=0.1),
        "counts": StepCounts(sequences=1, tokens=2),
        "correction": None,
        "ref_logprobs": torch.zeros(2),
    }
    with pytest.raises(ValueError, match=message):
        policy_loss(**(arguments | change))
