"""Several optimizer steps on one batch, against a plain loop over the textbook's formulas."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from outrider.algorithm.losses import LossSpec
from outrider.contract.arrays import unpack_floats, unpack_ints
from outrider.contract.feed import Sample
from outrider.trainer.clock import StepClock
from outrider.trainer.config import BatchConfig
from outrider.trainer.step import StepComputer, StepOutcome
from tests.server.models import save_model
from tests.trainer.build import batch_of, make_policy, random_samples, trained_tokens

RATE, CLIP, CAP, EPSILON, BETA, MAX_LENGTH = 0.5, 1.0, 2.0, 0.05, 0.05, 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen3", tmp_path_factory.mktemp("qwen3"))


def trained_logprobs(model: torch.nn.Module, one: Sample) -> Tensor:
    """Log-probabilities of a rollout's trained tokens, from full logits."""
    prompt, completion = unpack_ints(one.prompt).tolist(), unpack_ints(one.completion).tolist()
    table = torch.log_softmax(model(input_ids=torch.tensor([prompt + completion])).logits[0], dim=-1)
    places = [place for place in range(len(completion)) if not one.mask or one.mask[place]]
    return torch.stack([table[len(prompt) + place - 1, completion[place]] for place in places])


def plain_steps(
    directory: Path, parts: list[list[Sample]], iterations: int, loss_type: str
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, norms of gradients and weights: a step on each part, all of it ``iterations`` times."""
    model, frozen = (AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with torch.no_grad():
        before = [[trained_logprobs(frozen, one) for one in part] for part in parts]
    losses, norms = [], []
    for _ in range(iterations):
        for part, olds in zip(parts, before, strict=True):
            loss = torch.zeros(())
            for one, old in zip(part, olds, strict=True):
                new = trained_logprobs(model, one)
                sampled = torch.tensor(unpack_floats(one.logprobs).copy())
                if one.mask:
                    sampled = sampled[torch.tensor(list(one.mask)) != 0]
                ratio, correction = torch.exp(new - old), torch.exp(old - sampled).clamp(max=CAP)
                bounded = ratio.clamp(1 - EPSILON, 1 + EPSILON)
                terms = -torch.minimum(ratio * one.advantage, bounded * one.advantage) * correction
                terms = terms + BETA * (torch.exp(old - new) - (old - new) - 1)  # the reference is the first policy
                divisor = len(part) * len(new) if loss_type == "grpo" else sum(map(trained_tokens, part))
                loss = loss + terms.sum() / divisor
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
            losses.append(loss.item())
            optimizer.step()
    return losses, norms, {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize(("loss_type", "rows"), [("dapo", 3), ("grpo", 8)])
def test_two_parts_twice(model: Path, loss_type: str, rows: int) -> None:
    samples = random_samples(11, seed=5, masks=True)
    parts = [samples[:5], samples[5:]]
    losses, norms, weights = plain_steps(model, parts, 2, loss_type)

    policy, reference = make_policy(model), make_policy(model, trainable=False)
    spec = LossSpec(loss_type=loss_type, epsilon=EPSILON, beta=BETA, max_completion_length=MAX_LENGTH)  # type: ignore[arg-type]
    config = BatchConfig(per_device_train_batch_size=rows)
    computer = StepComputer(policy, reference, spec, config, "token_truncate", CAP, CLIP)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=RATE)
    works = computer.prepare([batch_of(part) for part in parts], StepClock())
    outcomes: list[StepOutcome] = []
    for work in works * 2:
        optimizer.zero_grad()
        outcomes.append(computer.gradients(work, StepClock()))
        optimizer.step()

    assert [outcome.loss for outcome in outcomes] == pytest.approx(losses, rel=1e-4, abs=1e-5)
    assert [outcome.grad_norm for outcome in outcomes] == pytest.approx(norms, rel=1e-3)
    for name, value in policy.model.named_parameters():
        torch.testing.assert_close(value.detach(), weights[name], rtol=1e-3, atol=1e-5)
    clipped = [outcome.clip_low_share + outcome.clip_high_share for outcome in outcomes]
    assert clipped[0] == 0.0
    assert min(clipped[1:]) > 0.0
    # What is of the policy before the batch stays.
    assert outcomes[0].logprob_gap == outcomes[2].logprob_gap
    assert outcomes[1].correction_mean == outcomes[3].correction_mean
    assert outcomes[0].kl == pytest.approx(0.0, abs=1e-6)
    assert outcomes[3].kl > outcomes[1].kl > 0.0


def test_the_policy_before_the_batch_is_the_one_of_its_first_step(model: Path) -> None:
    """What the first step leaves behind is what a pass of its own would have found."""
    policy = make_policy(model)
    spec = LossSpec(max_completion_length=MAX_LENGTH)
    computer = StepComputer(policy, None, spec, BatchConfig(per_device_train_batch_size=4), "none", CAP, CLIP)
    part = batch_of(random_samples(9, seed=6, masks=True))
    first, second = computer.prepare([part, part], StepClock())
    assert first.old == []
    computer.gradients(first, StepClock())
    assert len(first.old) == len(first.rounds) == len(second.old)
    for one, other in zip(first.old, second.old, strict=True):
        torch.testing.assert_close(one, other)
