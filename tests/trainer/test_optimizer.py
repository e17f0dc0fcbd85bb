import pytest
import torch
from torch import nn

from outrider.trainer.config import OptimizerConfig
from outrider.trainer.optimizer import learning_rate, make_optimizer


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        (
            "cosine",
            [0.5, 1.0, 1.0, 0.96193977, 0.85355339, 0.69134172, 0.5, 0.30865828, 0.14644661, 0.03806023],
        ),
    ],
)
def test_schedules_of_ten_steps_with_two_to_warm_up(schedule: str, rates: list[float]) -> None:
    found = [learning_rate(step, 10, 1.0, 0.2, schedule) for step in range(10)]  # type: ignore[arg-type]
    assert found == pytest.approx(rates, abs=1e-8)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_without_warm_up_the_first_step_has_the_peak(schedule: str) -> None:
    assert learning_rate(0, 7, 3e-4, 0.0, schedule) == 3e-4  # type: ignore[arg-type]


def test_warm_up_alone_and_warm_up_of_a_fraction_of_a_step() -> None:
    assert [learning_rate(step, 4, 2.0, 1.0, "cosine") for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    # Rounded up: 0.05 of 3 steps is one step, which has the whole rate.
    assert learning_rate(0, 3, 2.0, 0.05, "linear") == 2.0


def test_every_step_of_a_run_learns_something() -> None:
    for steps in (1, 2, 3, 50):
        for schedule in ("constant", "linear", "cosine"):
            assert all(learning_rate(step, steps, 1.0, 0.05, schedule) > 0 for step in range(steps))  # type: ignore[arg-type]


def test_matrices_decay_and_vectors_do_not() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    model[1].bias.requires_grad_(False)
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.7))
    matrices, vectors = optimizer.param_groups
    assert [tuple(p.shape) for p in matrices["params"]] == [(5, 4), (3, 4)]
    assert [tuple(p.shape) for p in vectors["params"]] == [(3,), (3,)]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert all(group["betas"] == (0.8, 0.7) for group in (matrices, vectors))


def test_one_step_of_adamw_against_its_formula() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, adam_epsilon=1e-8)
    optimizer = make_optimizer(model, config)
    model.weight.grad = torch.full_like(model.weight, 4.0)
    optimizer.step()
    # The first step is lr · sign(gradient), after the decay by lr · weight_decay.
    assert model.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, abs=1e-6)
