import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.cli.batch_plan import BatchPlan, plan_batch
from outrider.contract.errors import UserError
from outrider.trainer.config import BatchConfig


def plan(num_generations: int = 8, world_size: int = 1, **batch: int) -> BatchPlan:
    return plan_batch(BatchConfig(**batch), num_generations, world_size, batch.keys())


@pytest.mark.parametrize(
    ("world_size", "batch", "rollouts", "micro_batches"),
    [
        (1, {}, 8, 1),
        (4, {"per_device_train_batch_size": 2}, 8, 1),
        (2, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}, 24, 3),
        (2, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "steps_per_generation": 3}, 24, 3),
        (2, {"per_device_train_batch_size": 4, "generation_batch_size": 40}, 40, 5),
        (2, {"per_device_train_batch_size": 3, "generation_batch_size": 40}, 40, 7),
        (1, {"per_device_train_batch_size": 64, "generation_batch_size": 16}, 16, 1),
        (
            1,
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "generation_batch_size": 16},
            16,
            4,
        ),
    ],
)
def test_sizes(world_size: int, batch: dict[str, int], rollouts: int, micro_batches: int) -> None:
    assert plan(world_size=world_size, **batch) == BatchPlan(
        rollouts_per_batch=rollouts, groups_per_batch=rollouts // 8, micro_batches=micro_batches
    )


@pytest.mark.parametrize(
    ("batch", "parts"),
    [
        ({"generation_batch_size": 100}, ["--generation_batch_size 100", "set --generation_batch_size 96 or 104"]),
        ({"generation_batch_size": 4}, ["set --generation_batch_size 8"]),
        (
            {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 7},
            ["a batch of 21 rollouts", "3 x 1 device(s) x", "16 or 24 in place of --gradient_accumulation_steps"],
        ),
        (
            {"gradient_accumulation_steps": 2, "generation_batch_size": 64},
            ["--generation_batch_size 64 is not", "8 x 1 device(s) x --gradient_accumulation_steps 2 = 16"],
        ),
        (
            {"steps_per_generation": 4},
            ["--steps_per_generation 4", "one optimizer step a batch", "set --gradient_accumulation_steps 4"],
        ),
        (
            {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
            ["--steps_per_generation 4 with --gradient_accumulation_steps 2"],
        ),
        ({"steps_per_generation": 4, "generation_batch_size": 32}, ["both size the batch"]),
        ({"num_iterations": 2}, ["--num_iterations 2", "set --num_iterations 1"]),
    ],
)
def test_what_does_not_fit(batch: dict[str, int], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        plan(**batch)
    assert all(part in str(caught.value) for part in parts), caught.value


sizes = st.integers(1, 40)


@given(st.integers(2, 16), sizes, sizes, sizes)
def test_the_sizes_suggested_do_fit(num_generations: int, world_size: int, per_device: int, rollouts: int) -> None:
    batch = {"per_device_train_batch_size": per_device, "generation_batch_size": rollouts}
    try:
        found = plan(num_generations, world_size, **batch)
    except UserError as error:
        suggested = [int(word) for word in str(error).rsplit("--generation_batch_size", 1)[1].split() if word != "or"]
        assert min(abs(size - rollouts) for size in suggested) <= num_generations
        for size in suggested:
            plan(num_generations, world_size, per_device_train_batch_size=per_device, generation_batch_size=size)
    else:
        assert found.groups_per_batch * num_generations == rollouts
        assert (found.micro_batches - 1) * per_device * world_size < rollouts
        assert rollouts <= found.micro_batches * per_device * world_size
