"""Where time goes, on either side: parts that add up to the wall clock."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from outrider.observe.records import StepRecord

#: Seconds of a step, by the name of the part.
Parts: TypeAlias = Mapping[str, Callable[[StepRecord], float]]


def _waiting_for_rewards(record: StepRecord) -> float:
    # It is counted while no server at all has work, and idle time as a mean over those that are up: never more of it.
    return min(record.reward_wait_seconds, record.generation_idle_seconds)


#: The trainer; together ``seconds``.
TRAINER: Parts = {
    "train": lambda record: record.train_seconds,
    "wait": lambda record: record.wait_seconds,
    "collate": lambda record: record.collate_seconds,
    "publish": lambda record: record.publish_wait_seconds,
    "save": lambda record: record.save_seconds,
    "other": lambda record: record.other_seconds,
}

#: The servers, as a mean; together ``batch_seconds``, and for one row of each batch. idle: nothing to do, because the
#: staleness bound or the data admits nothing.
SERVERS: Parts = {
    "generate": lambda record: record.generation_busy_seconds,
    "idle": lambda record: record.generation_idle_seconds - _waiting_for_rewards(record),
    "wait for rewards": _waiting_for_rewards,
    "down": lambda record: record.generation_down_seconds,
}

#: What goes on beside generation and is no part of that sum; for one row of each batch.
BESIDE: Parts = {
    "rewards": lambda record: record.reward_seconds,
    "stage": lambda record: record.stage_seconds,
    "commit": lambda record: record.commit_seconds,
    "pack": lambda record: record.pack_seconds,
}


def one_a_batch(records: Iterable[StepRecord]) -> list[StepRecord]:
    """The last row of each batch. What is said of a batch stands in the rows of all steps on it, and is to be added up
    once."""
    return list({record.version: record for record in records}.values())


def sampling_rate(records: Iterable[StepRecord]) -> float:
    """Tokens that the servers sampled in a second, over the batches of ``records``: of batches that leave one right
    after the other, the later one alone would have none. nan where no time has passed."""
    batches = one_a_batch(records)
    seconds = sum(_amount(record.batch_seconds) for record in batches)
    tokens = sum(record.tokens_per_second * _amount(record.batch_seconds) for record in batches)
    return tokens / seconds if seconds else math.nan


def totals(records: Iterable[StepRecord], parts: Parts) -> dict[str, float]:
    """Seconds that went to each part; what is no length of time counts as nothing."""
    rows = list(records)
    return {name: sum(_amount(seconds(record)) for record in rows) for name, seconds in parts.items()}


def shares(records: Iterable[StepRecord], parts: Parts) -> dict[str, float]:
    """Share of each part in their sum; nan where that is 0."""
    found = totals(records, parts)
    whole = sum(found.values())
    return {name: seconds / whole if whole else math.nan for name, seconds in found.items()}


def _amount(seconds: float) -> float:
    return seconds if 0 <= seconds < 1e10 else 0.0
