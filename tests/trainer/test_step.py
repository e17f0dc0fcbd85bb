from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from outrider.algorithm.losses import LossSpec
from outrider.contract.arrays import unpack_floats, unpack_ints
from outrider.contract.feed import MiniBatch, Sample
from outrider.trainer.clock import StepClock
from outrider.trainer.config import BatchConfig, CorrectionMode
from outrider.trainer.model import Policy
from outrider.trainer.step import StepComputer, StepOutcome
from tests.server.models import save_model
from tests.trainer.build import batch_of, make_policy, one_a_row, random_samples, sample, trained_tokens

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")
MAX_LENGTH = 16
Gradient = dict[str, Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def policy(model: Path) -> Policy:
    return make_policy(model)


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with every weight moved a little."""
    moved = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp("reference")
    moved.save_pretrained(directory)
    return directory


def gradient(
    policy: Policy,
    batch: MiniBatch,
    *,
    loss_type: str = "dapo",
    beta: float = 0.0,
    reference: Policy | None = None,
    rows: int = 8,
    budget: int | None = None,
    correction: CorrectionMode = "none",
    threshold: float = 2.0,
    max_grad_norm: float = 0.0,
) -> tuple[StepOutcome, Gradient]:
    spec = LossSpec(loss_type=loss_type, beta=beta, max_completion_length=MAX_LENGTH)  # type: ignore[arg-type]
    config = BatchConfig(per_device_train_batch_size=rows, max_tokens_per_micro_batch=budget)
    policy.model.zero_grad(set_to_none=True)
    computer = StepComputer(policy, reference, spec, config, correction, threshold, max_grad_norm)
    [work] = computer.prepare([batch], StepClock())
    outcome = computer.gradients(work, StepClock())
    return outcome, {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def assert_same(found: Gradient, expected: Gradient) -> None:
    """Equal but for the order of float32 sums."""
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5 * scale, msg=f"{name} differs")


def slow_gradient(
    directory: Path, samples: list[Sample], loss_type: str, beta: float, reference: Path, capped: bool
) -> tuple[float, Gradient]:
    """Loss and gradient of the textbook formulas, a rollout and a token at a time, from full logits.

    capped: with the rollout correction token_truncate at 2.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    frozen = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).requires_grad_(False)
    total = sum(map(trained_tokens, samples))
    loss = torch.zeros(())
    for one in samples:
        prompt, completion = unpack_ints(one.prompt), unpack_ints(one.completion).tolist()
        ids = torch.tensor([[*prompt, *completion]], dtype=torch.int64)
        table, other = (torch.log_softmax(m(input_ids=ids).logits[0], dim=-1) for m in (model, frozen))
        for place, token in enumerate(completion):
            if one.mask and not one.mask[place]:
                continue
            logprob = table[len(prompt) + place - 1, token]
            gap = other[len(prompt) + place - 1, token] - logprob
            weight = {
                "grpo": 1.0 / (len(samples) * trained_tokens(one)),
                "dr_grpo": 1.0 / (len(samples) * MAX_LENGTH),
            }.get(loss_type, 1.0 / total)
            ratio = torch.exp(logprob.detach() - float(unpack_floats(one.logprobs)[place]))
            correction = min(float(ratio), 2.0) if capped else 1.0
            policy_term = -torch.exp(logprob - logprob.detach()) * one.advantage * correction
            loss = loss + weight * (policy_term + beta * (torch.exp(gap) - gap - 1.0))
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_gradients_against_the_formulas(
    policy: Policy, model: Path, reference: Path, loss_type: str, beta: float, capped: bool
) -> None:
    samples = random_samples(6, seed=10, masks=True)
    other = make_policy(reference, trainable=False) if beta else None
    loss, expected = slow_gradient(model, samples, loss_type, beta, reference, capped)
    outcome, found = gradient(
        policy, batch_of(samples), loss_type=loss_type, beta=beta, reference=other, rows=2,
        correction="token_truncate" if capped else "none",
    )  # fmt: skip
    assert outcome.loss == pytest.approx(loss, rel=1e-4, abs=1e-5)
    assert outcome.tokens == sum(map(trained_tokens, samples))
    assert (outcome.kl > 0) == (beta > 0)
    assert_same(found, expected)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_how_rollouts_are_packed_changes_only_rounding(policy: Policy, loss_type: str) -> None:
    batch = batch_of(random_samples(9, seed=11, masks=True))
    shapes: list[dict[str, Any]] = [{"rows": 1}, {"rows": 4}, {"budget": 1}, {"budget": 30}, {"budget": 100}]
    whole, expected = gradient(policy, batch, loss_type=loss_type, rows=9)
    for shape in shapes:
        outcome, found = gradient(policy, batch, loss_type=loss_type, correction="none", **shape)
        assert_same(found, expected)
        for name in ("loss", "grad_norm", "logprob_gap", "logprob_gap_max"):
            assert getattr(outcome, name) == pytest.approx(getattr(whole, name), rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("correction", get_args(CorrectionMode))
def test_corrections_do_not_depend_on_packing(policy: Policy, correction: CorrectionMode) -> None:
    batch = batch_of(random_samples(8, seed=12))
    whole, expected = gradient(policy, batch, rows=8, correction=correction, threshold=1.5)
    split, found = gradient(policy, batch, rows=3, correction=correction, threshold=1.5)
    assert split.correction_mean == pytest.approx(whole.correction_mean, rel=1e-4)
    assert_same(found, expected)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_groups_without_signal_may_stay_away(policy: Policy, loss_type: str) -> None:
    """Their advantages are 0: with their sequences and tokens counted, the gradient is as if they had come along."""
    signal = random_samples(6, seed=13, masks=True)
    silent = [sample(unpack_ints(s.prompt), unpack_ints(s.completion), group=9) for s in random_samples(4, seed=14)]
    everything = batch_of(signal + silent)
    _, expected = gradient(policy, everything, loss_type=loss_type)
    _, found = gradient(policy, batch_of(signal, everything.sequences, everything.tokens), loss_type=loss_type)
    assert_same(found, expected)
    _, otherwise = gradient(policy, batch_of(signal), loss_type=loss_type)
    name = next(iter(expected))
    assert not torch.allclose(otherwise[name], expected[name], rtol=1e-2)  # the counts do matter


def test_the_gap_is_between_trainer_and_sampler(policy: Policy) -> None:
    samples = random_samples(3, seed=15)
    near = [
        sample(unpack_ints(s.prompt), unpack_ints(s.completion), advantage=s.advantage, logprobs=logprobs)
        for s, logprobs in zip(samples, own_logprobs(policy, samples), strict=True)
    ]
    outcome, _ = gradient(policy, batch_of(near), correction="token_truncate")
    assert outcome.logprob_gap < 1e-5
    assert outcome.correction_mean == pytest.approx(1.0, abs=1e-5)


def own_logprobs(policy: Policy, samples: list[Sample]) -> list[list[float]]:
    with torch.no_grad():
        return [policy.logprobs(one_a_row([one])).tolist() for one in samples]


@pytest.mark.parametrize("rows", [2, 8])
def test_the_entropy_is_told_when_it_is_asked_for(policy: Policy, rows: int) -> None:
    samples = random_samples(9, seed=6, masks=True)
    spec = LossSpec(loss_type="dapo", beta=0.0, max_completion_length=MAX_LENGTH)
    config = BatchConfig(per_device_train_batch_size=rows)
    computer = StepComputer(policy, None, spec, config, "none", 2.0, 0.0, entropy=True)
    [work] = computer.prepare([batch_of(samples)], StepClock())
    found = computer.gradients(work, StepClock())
    entropies = []
    for each in samples:
        ids = torch.tensor([*unpack_ints(each.prompt), *unpack_ints(each.completion)])[None]
        distribution = torch.log_softmax(policy.model(input_ids=ids).logits[0], -1)
        entropy = -(distribution.exp() * distribution).sum(-1)[len(each.prompt) // 4 - 1 : -1]
        entropies.append(entropy[torch.tensor(list(each.mask), dtype=torch.bool)] if each.mask else entropy)
    assert found.entropy == pytest.approx(float(torch.cat(entropies).mean().detach()), rel=1e-4)
    assert gradient(policy, batch_of(samples))[0].entropy is None


def test_the_gradient_is_clipped_and_its_norm_before_that_is_told(policy: Policy) -> None:
    batch = batch_of(random_samples(6, seed=16))
    free, whole = gradient(policy, batch)
    norm = float(torch.stack([value.norm() for value in whole.values()]).norm())
    assert free.grad_norm == pytest.approx(norm, rel=1e-4)
    told, clipped = gradient(policy, batch, max_grad_norm=norm / 4)
    assert told.grad_norm == pytest.approx(norm, rel=1e-4)
    assert float(torch.stack([value.norm() for value in clipped.values()]).norm()) == pytest.approx(norm / 4, rel=1e-3)


def test_rollouts_without_a_trained_token_are_harmless(policy: Policy) -> None:
    empty = sample([5, 6], [7, 8], mask=[0, 0], advantage=1.0)
    outcome, found = gradient(policy, batch_of([empty]))
    assert (outcome.tokens, outcome.loss, outcome.grad_norm) == (0, 0.0, 0.0)
    assert all(torch.isfinite(value).all() for value in found.values())


def test_without_rollouts_the_gradient_is_zero(policy: Policy) -> None:
    """And not absent: the optimizer's momentum moves the weights as if groups without signal had come along."""
    outcome, found = gradient(policy, batch_of([], sequences=4, tokens=20))
    assert (outcome.tokens, outcome.loss, outcome.grad_norm) == (0, 0.0, 0.0)
    assert len(found) == len(list(policy.model.parameters()))
    assert not any(value.any() for value in found.values())
