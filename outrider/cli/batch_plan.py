"""The arithmetic of a step: from batch sizes and world size to rollouts, groups and micro-batches."""

import math
from collections.abc import Set

import msgspec

from outrider.contract.errors import UserError
from outrider.trainer.config import BatchConfig


class BatchPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What one optimizer step consists of. micro_batches are those of one device."""

    rollouts_per_batch: int
    groups_per_batch: int
    micro_batches: int


def plan_batch(batch: BatchConfig, num_generations: int, world_size: int, given: Set[str]) -> BatchPlan:
    """The plan of a step. UserError where the numbers do not fit, or ask for several optimizer steps a batch."""
    _check_one_step(batch, given)
    per_pass = batch.per_device_train_batch_size * world_size
    micro_batches = batch.gradient_accumulation_steps
    rollouts = per_pass * micro_batches
    wanted = batch.generation_batch_size
    if wanted is not None and wanted != rollouts:
        if "gradient_accumulation_steps" in given or batch.steps_per_generation is not None:
            raise UserError(
                f"--generation_batch_size {wanted} is not --per_device_train_batch_size "
                f"{batch.per_device_train_batch_size} x {world_size} device(s) x --gradient_accumulation_steps "
                f"{batch.gradient_accumulation_steps} = {rollouts}, and this version takes one optimizer step a batch: "
                f"leave out --gradient_accumulation_steps and --steps_per_generation, or --generation_batch_size"
            )
        rollouts = wanted
        micro_batches = math.ceil(wanted / per_pass)
    if rollouts % num_generations:
        raise _indivisible(batch, rollouts, num_generations, given, per_pass)
    return BatchPlan(
        rollouts_per_batch=rollouts, groups_per_batch=rollouts // num_generations, micro_batches=micro_batches
    )


def _check_one_step(batch: BatchConfig, given: Set[str]) -> None:
    if batch.num_iterations > 1:
        raise UserError(
            f"--num_iterations {batch.num_iterations}: this version takes one optimizer step a batch; "
            "set --num_iterations 1"
        )
    steps, accumulation = batch.steps_per_generation, batch.gradient_accumulation_steps
    derived = batch.generation_batch_size is not None and "gradient_accumulation_steps" not in given
    if steps is None or steps == accumulation:
        return
    if derived:
        raise UserError(
            f"--generation_batch_size {batch.generation_batch_size} and --steps_per_generation {steps} both size the "
            "batch: give one of them"
        )
    raise UserError(
        f"--steps_per_generation {steps} with --gradient_accumulation_steps {accumulation}: this version takes one "
        f"optimizer step a batch, so the two are equal; set --gradient_accumulation_steps {steps} "
        "or leave out --steps_per_generation"
    )


def _indivisible(batch: BatchConfig, rollouts: int, num_generations: int, given: Set[str], per_pass: int) -> UserError:
    below = rollouts - rollouts % num_generations
    nearest = " or ".join(str(size) for size in (below, below + num_generations) if size)
    if batch.generation_batch_size is not None:
        found = f"--generation_batch_size {rollouts}"
        rest = " and leave out --gradient_accumulation_steps" if "gradient_accumulation_steps" in given else ""
    else:
        found = (
            f"a batch of {rollouts} rollouts (--per_device_train_batch_size {batch.per_device_train_batch_size} x "
            f"{per_pass // batch.per_device_train_batch_size} device(s) x --gradient_accumulation_steps "
            f"{batch.gradient_accumulation_steps})"
        )
        rest = " in place of --gradient_accumulation_steps" if "gradient_accumulation_steps" in given else ""
    return UserError(
        f"{found} does not hold whole groups of --num_generations {num_generations}: "
        f"set --generation_batch_size {nearest}{rest}"
    )
