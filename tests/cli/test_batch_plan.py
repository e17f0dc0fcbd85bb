import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.cli.batch_plan import BatchPlan, plan_batch
from outrider.contract.errors import UserError
from outrider.trainer.config import BatchConfig


def plan(num_generations: int = 8, world_size: int = 1, **batch: int) -> BatchPlan:
    return plan_batch(BatchConfig(**batch), num_generations, world_size)


def sized(size: int, accumulation: int = 1, passes: int | None = None, rollouts: int | None = None) -> dict[str, int]:
    found = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": passes,
        "generation_batch_size": rollouts,
    }
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    ("world_size", "batch", "rollouts", "mini_batches", "micro_batches"),
    [
        (1, {}, 8, 1, 1),
        (4, sized(2), 8, 1, 1),
        (2, sized(4, 3), 24, 1, 3),
        (2, sized(4, 3, passes=3), 24, 1, 3),
        (2, sized(4, passes=3), 24, 3, 1),
        (2, sized(4, 2, passes=6), 48, 3, 2),
        (2, sized(4, rollouts=40), 40, 5, 1),
        (1, sized(8, 2, rollouts=64), 64, 4, 2),
        (1, sized(4, 4, rollouts=16), 16, 1, 4),
        (1, sized(4, 2, passes=4, rollouts=16), 16, 2, 2),
    ],
)
def test_sizes(world_size: int, batch: dict[str, int], rollouts: int, mini_batches: int, micro_batches: int) -> None:
    assert plan(world_size=world_size, **batch) == BatchPlan(
        rollouts_per_batch=rollouts,
        groups_per_batch=rollouts // 8,
        mini_batches=mini_batches,
        micro_batches=micro_batches,
    )


@pytest.mark.parametrize(
    ("batch", "parts"),
    [
        (sized(8, rollouts=100), ["--generation_batch_size 100", "set --generation_batch_size 96 or 104"]),
        (sized(8, rollouts=4), ["set --generation_batch_size 8"]),
        (sized(8, 2, rollouts=40), ["whole optimizer steps of 16 rollouts (--per", "8 x 1 device(s) x", "32 or 48"]),
        (
            sized(3, 7),
            ["a batch of 21 rollouts", "3 x 1 device(s) x --gradient_accumulation_steps 7", "_size 8, or --", "8"],
        ),
        (sized(2, 3, passes=6), ["a batch of 12 rollouts", "--steps_per_generation 6", "_generation 12"]),
        (
            sized(8, 2, passes=5),
            ["--steps_per_generation 5 is no multiple of --gradient_accumulation_steps 2", "_generation 4 or 6"],
        ),
        (sized(8, 4, passes=2), ["--steps_per_generation 2 is no multiple of", "set --steps_per_generation 4"]),
        (sized(8, passes=4, rollouts=64), ["both size the batch", "(which makes it 32)"]),
    ],
)
def test_what_does_not_fit(batch: dict[str, int], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        plan(**batch)
    assert all(part in str(caught.value) for part in parts), caught.value


def attempt(num_generations: int, world_size: int, **batch: int) -> BatchPlan | str:
    """The plan, or what is said of why there is none."""
    try:
        return plan(num_generations, world_size, **batch)
    except UserError as error:
        return str(error)


def suggested(message: str) -> list[dict[str, int]]:
    """The settings that a message tells to choose one of."""
    remedies = re.findall(r"(\w+) (\d+(?: or \d+)?)", message.rsplit("set --", 1)[1])
    return [{flag: int(value)} for flag, values in remedies for value in values.split(" or ")]


sizes = st.integers(1, 12)


@given(st.integers(2, 16), sizes, sizes, sizes, st.one_of(st.none(), sizes))
def test_a_plan_adds_up(groups: int, world_size: int, size: int, accumulation: int, passes: int | None) -> None:
    batch = sized(size, accumulation, passes)
    found = attempt(groups, world_size, **batch)
    if isinstance(found, BatchPlan):
        assert found.groups_per_batch * groups == found.rollouts_per_batch
        assert found.micro_batches == accumulation
        assert found.mini_batches * accumulation * size * world_size == found.rollouts_per_batch
        return
    assert suggested(found)
    for remedy in suggested(found):
        other = attempt(groups, world_size, **batch | remedy)
        if isinstance(other, str):  # one flaw is told at a time
            assert "is no multiple of" in found
            for further in suggested(other):
                plan(groups, world_size, **batch | remedy | further)


@given(st.integers(2, 16), sizes, sizes, sizes, st.integers(1, 500))
def test_the_rollouts_of_a_batch(groups: int, world_size: int, size: int, accumulation: int, rollouts: int) -> None:
    found = attempt(groups, world_size, **sized(size, accumulation, rollouts=rollouts))
    if isinstance(found, BatchPlan):
        assert found.rollouts_per_batch == found.groups_per_batch * groups == rollouts
        assert found.mini_batches * accumulation * size * world_size == rollouts
        return
    unit = math.lcm(groups, size * world_size * accumulation)
    assert suggested(found)
    for remedy in suggested(found):
        assert abs(remedy["generation_batch_size"] - rollouts) < unit
        plan(groups, world_size, **sized(size, accumulation) | remedy)
