"""The arithmetic of a batch: from batch sizes and world size to rollouts, groups, optimizer steps and micro-batches.

It is that of TRL and ms-swift. steps_per_generation counts micro-batches, gradient_accumulation_steps of which are an
optimizer step:

    generation_batch_size = per_device_train_batch_size x devices x steps_per_generation
    optimizer steps a batch = steps_per_generation / gradient_accumulation_steps x num_iterations
"""

import math

import msgspec

from outrider.contract.errors import UserError
from outrider.trainer.config import BatchConfig


class BatchPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What one batch of rollouts consists of.

    mini_batches: parts that an optimizer step each is taken on, num_iterations times. micro_batches: of one device in
    an optimizer step.
    """

    rollouts_per_batch: int
    groups_per_batch: int
    mini_batches: int
    micro_batches: int


def plan_batch(batch: BatchConfig, num_generations: int, world_size: int) -> BatchPlan:
    """The plan of a batch. UserError where the numbers do not fit, with those that would."""
    per_pass = batch.per_device_train_batch_size * world_size
    accumulation = batch.gradient_accumulation_steps
    passes = _passes(batch, per_pass, num_generations)
    if passes % accumulation:
        raise UserError(
            f"--steps_per_generation {passes} is no multiple of --gradient_accumulation_steps {accumulation}: an "
            f"optimizer step would take rollouts of two batches; set --steps_per_generation "
            f"{_near(passes, accumulation)}"
        )
    rollouts = per_pass * passes
    if rollouts % num_generations:
        raise _indivisible(batch, passes, num_generations, world_size)
    return BatchPlan(
        rollouts_per_batch=rollouts,
        groups_per_batch=rollouts // num_generations,
        mini_batches=passes // accumulation,
        micro_batches=accumulation,
    )


def _passes(batch: BatchConfig, per_pass: int, num_generations: int) -> int:
    """Micro-batches of a device in a batch: --steps_per_generation, given or implied."""
    wanted, passes = batch.generation_batch_size, batch.steps_per_generation
    if wanted is None:
        return batch.gradient_accumulation_steps if passes is None else passes
    if passes is not None and wanted != per_pass * passes:
        raise UserError(
            f"--generation_batch_size {wanted} and --steps_per_generation {passes} (which makes it "
            f"{per_pass * passes}) both size the batch: give one of them"
        )
    unit = per_pass * batch.gradient_accumulation_steps
    if wanted % unit or wanted % num_generations:
        devices = _devices(batch, per_pass)
        raise UserError(
            f"--generation_batch_size {wanted} must hold whole groups of --num_generations {num_generations}, and "
            f"whole optimizer steps of {unit} rollouts ({devices} x --gradient_accumulation_steps "
            f"{batch.gradient_accumulation_steps}): set --generation_batch_size "
            f"{_near(wanted, math.lcm(unit, num_generations))}"
        )
    return wanted // per_pass


def _devices(batch: BatchConfig, per_pass: int) -> str:
    size = batch.per_device_train_batch_size
    return f"--per_device_train_batch_size {size} x {per_pass // size} device(s)"


def _indivisible(batch: BatchConfig, passes: int, num_generations: int, world_size: int) -> UserError:
    size, accumulation = batch.per_device_train_batch_size, batch.gradient_accumulation_steps
    named = "gradient_accumulation_steps" if batch.steps_per_generation is None else "steps_per_generation"
    unit = num_generations // math.gcd(num_generations, size * world_size)
    if named == "steps_per_generation":
        unit = math.lcm(unit, accumulation)
    sizes = _near(size, num_generations // math.gcd(num_generations, passes * world_size))
    return UserError(
        f"a batch of {size * world_size * passes} rollouts (--per_device_train_batch_size {size} x {world_size} "
        f"device(s) x --{named} {passes}) does not hold whole groups of --num_generations {num_generations}: set "
        f"--per_device_train_batch_size {sizes}, or --{named} {_near(passes, unit)}"
    )


def _near(value: int, unit: int) -> str:
    """The multiples of ``unit`` on either side of ``value``."""
    below = value - value % unit
    return " or ".join(str(multiple) for multiple in (below, below + unit) if multiple)
