"""The gate that bounds staleness by construction, and the rule by which finished groups become batches.

The group at place A of the queue (counting the groups of all earlier batches, those finished and those running)
ships with batch ⌊A/N⌋ at the latest, N groups being a batch, if batches take the groups with the earliest deadlines
first. Sampled from version s on, its staleness is then at most ⌊A/N⌋ − s. So a group may start when
A < (s + K + 1)·N, which is AReaL's capacity rule (Fu et al. 2025, arXiv:2505.24298), and its deadline is batch s + K.

With earliest deadlines first, and a batch waiting for the running groups whose deadline it is, no group ever ships
later than its deadline: when the last group with a deadline ≤ d starts, at most (d+1)·N groups stand in the queue,
so the batches 0..d have room for all of them. Nothing has to be dropped to hold the bound.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar


class Queued(Protocol):
    """A group with its deadline: the last batch it may ship with."""

    @property
    def id(self) -> int: ...

    @property
    def deadline(self) -> int: ...


@dataclass
class Gate:
    """Counts what stands in the queue. next_step: the batch being formed; a batch's number is the version it trains.

    pending: groups running or finished that have not shipped. max_steps: no group is started for later batches.
    """

    groups_per_batch: int
    max_staleness: int
    next_step: int = 0
    max_steps: int = 0
    pending: int = 0
    running: dict[int, int] = field(default_factory=dict)  # group id → deadline

    def admits(self, version: int) -> bool:
        """Whether a group may start now on a server that holds ``version``."""
        place = self.next_step * self.groups_per_batch + self.pending
        horizon = min(version + self.max_staleness + 1, self.max_steps)
        return place < horizon * self.groups_per_batch

    def start(self, group: int, version: int) -> int:
        """A group starts on a server that holds ``version``; returns its deadline."""
        deadline = version + self.max_staleness
        self.running[group] = deadline
        self.pending += 1
        return deadline

    def finish(self, group: int) -> None:
        """A running group has its rollouts and rewards, and stays in the queue."""
        del self.running[group]

    def drop(self, group: int) -> None:
        """A group leaves the queue without shipping, running or finished."""
        self.running.pop(group, None)
        self.pending -= 1

    def ship(self) -> None:
        """The batch being formed ships."""
        self.pending -= self.groups_per_batch
        self.next_step += 1


Group = TypeVar("Group", bound=Queued)


def choose_batch(finished: Iterable[Group], gate: Gate) -> list[Group] | None:
    """The groups of the next batch, earliest deadline first and then by id; None while it must wait.

    It waits for N finished groups, and for every running group that may not ship later than this batch.
    """
    if any(deadline <= gate.next_step for deadline in gate.running.values()):
        return None
    ordered = sorted(finished, key=lambda group: (group.deadline, group.id))
    if len(ordered) < gate.groups_per_batch:
        return None
    return ordered[: gate.groups_per_batch]
