"""What ``--dry_run`` prints: the sections of a configuration, and the arithmetic of a batch in words."""

import math
from collections.abc import Set

from outrider.cli.placement import Placement
from outrider.cli.train_config import Resolved, TrainConfig
from outrider.cli.values import as_text
from outrider.contract.options import Section


def describe(config: TrainConfig, resolved: Resolved, placement: Placement) -> str:
    """The configuration by section, then what follows from it. A star marks what was given."""
    sections = {
        name: section for name in TrainConfig.__struct_fields__ if isinstance(section := getattr(config, name), Section)
    }
    blocks = [describe_section(name, section, config.given) for name, section in sections.items()]
    return "\n\n".join([*blocks, _consequences(config, resolved, placement)])


def describe_section(title: str, section: Section, given: Set[str] = frozenset()) -> str:
    """A title and a line for each field. Keys are not shown."""
    lines = [title]
    for name in section.__struct_fields__:
        value = getattr(section, name)
        text = "(hidden)" if name.endswith("api_key") and value else as_text(value)
        lines.append(f"{'*' if name in given else ' ':>3} {name:<38} {text}")
    return "\n".join(lines)


def _consequences(config: TrainConfig, resolved: Resolved, placement: Placement) -> str:
    clip = f"{1 - resolved.epsilon_low:g} to {1 + resolved.epsilon_high:g}"
    lines = [
        "what follows",
        f"    {_processes(placement)}",
        *_tensor_parallel(config, resolved),
        f"    {_batch(config, resolved)}; {_steps(config, resolved)}; {_micro_batches(config, resolved)}",
        f"    {_staleness(resolved.max_staleness, resolved.groups_per_batch)}",
        f"    correction: {resolved.correction_mode}; clip range: {clip}",
        f"    length: {_length(config, resolved)}",
        f"    rewards: {_rewards(config, resolved)}",
        f"    servers: {' '.join(resolved.server_urls)}",
        *(f"    warning: {warning}" for warning in resolved.warnings),
    ]
    return "\n".join(lines)


def _processes(placement: Placement) -> str:
    total = _counted(placement.world_size, "process", "processes")
    if placement.nodes > 1:
        total = f"{placement.nodes} nodes x {placement.processes} = {total}, this is node {placement.node}"
    return f"{total} ({placement.why})" if placement.why else total


def _tensor_parallel(config: TrainConfig, resolved: Resolved) -> list[str]:
    size = config.model.tensor_parallel_size
    if size == 1:
        return []
    groups = _counted(resolved.world_size, "group")
    return [
        f"    tensor parallelism: {groups} of {size} processes that compute every layer together, each a device below"
    ]


def _batch(config: TrainConfig, resolved: Resolved) -> str:
    prompts = _counted(resolved.groups_per_batch, "prompt")
    return f"{prompts} x {config.sampling.num_generations} rollouts = {resolved.rollouts_per_batch} rollouts a batch"


def _steps(config: TrainConfig, resolved: Resolved) -> str:
    steps = f"{_counted(resolved.steps_per_batch, 'optimizer step')} a batch"
    if resolved.steps_per_batch == 1:
        return steps
    rollouts = resolved.rollouts_per_batch // resolved.mini_batches
    parts = f"{_counted(resolved.mini_batches, 'mini-batch', 'mini-batches')} of {rollouts} rollouts"
    times = config.batch.num_iterations
    return f"{parts}{'' if times == 1 else f' x {times} iterations'} = {steps}, after which weights are published"


def _micro_batches(config: TrainConfig, resolved: Resolved) -> str:
    devices = "" if resolved.world_size == 1 else f" on each of {resolved.world_size} devices"
    budget = config.batch.max_tokens_per_micro_batch
    if budget is not None:
        return f"micro-batches of up to {budget} tokens{devices}"
    size = config.batch.per_device_train_batch_size
    count = _counted(resolved.micro_batches, "micro-batch", "micro-batches")
    return f"{count} of {size}{devices}{'' if resolved.steps_per_batch == 1 else ' a step'}"


def _staleness(bound: int, groups: int) -> str:
    if bound == 0:
        return f"K = 0: on-policy; at most {_counted(groups, 'group')} in flight; generation waits for every update"
    return f"K = {bound}: at most {bound + 1} x {_counted(groups, 'group')} ahead of the trainer"


def _length(config: TrainConfig, resolved: Resolved) -> str:
    steps, each = config.batch.max_steps, resolved.steps_per_batch
    if steps > 0:
        told = _counted(steps, "optimizer step")
        if each == 1:
            return told
        rest = f", the last one for {steps % each} of its {each}" if steps % each else ""
        return f"{told} on {_counted(math.ceil(steps / each), 'batch', 'batches')}{rest}"
    return _counted(config.batch.num_train_epochs, "epoch")


def _rewards(config: TrainConfig, resolved: Resolved) -> str:
    pairs = zip(resolved.reward_weights, config.rewards.reward_funcs, strict=True)
    return ", ".join(f"{weight:g} x {name}" for weight, name in pairs)


def _counted(count: float, one: str, many: str | None = None) -> str:
    return f"{count if isinstance(count, int) else f'{count:g}'} {one if count == 1 else many or one + 's'}"
