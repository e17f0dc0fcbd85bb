"""The gate that bounds staleness by construction, and the rule by which finished groups become batches.

N groups are a batch. A group sampled from version s on must ship with batch s + K at the latest: its deadline. It may
start when, with the b batches that have shipped and the groups that are pending (running or finished), it has a place
among the first (s + K + 1)·N: b·N + pending < (s + K + 1)·N, which is AReaL's capacity rule (Fu et al. 2025,
arXiv:2505.24298).

Why no group ever ships later than its deadline. Call the queue sound when for every d ≥ b − 1 at most (d + 1 − b)·N
pending groups have a deadline ≤ d: so many places do the batches b..d have. The empty queue is sound, and each event
leaves it so:

- A group starts: the rule leaves at most (s + K + 1 − b)·N groups pending altogether, hence no more than that for its
  own deadline and for later ones; earlier ones are as before.
- A group finishes, or is dropped: no count grows.
- Batch b ships, with the earliest deadlines first, and only if for every d at most (d − b)·N *running* groups have a
  deadline ≤ d. If the batch holds fewer than N groups with a deadline ≤ d, these are all that were finished, and the
  running ones fit into the batches b + 1..d. If it holds N, at most (d + 1 − b)·N − N are left. Sound for b + 1.

A sound queue has no group with a deadline before b (d = b − 1). To wait only for the running groups whose deadline is
b itself is not enough from K = 2 on: later groups that finish early would ship in the place of running ones, and leave
too few batches for these.

Why nothing waits for ever. While a batch may not ship for the sake of running groups, these finish or are dropped. Once
nothing runs, a sound queue of at least N groups ships; and with fewer than N pending, a group may start on any server
that holds a version ≥ b − K, which servers come to hold, since all batches before b have been trained.
"""

from collections import Counter
from collections.abc import Collection
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
    _due: Counter[int] = field(default_factory=Counter)  # deadline → running groups that have it

    def oldest_admitted(self) -> int | None:
        """The oldest version with which a group may start now; None when none may, for there are no more steps."""
        place = self.next_step * self.groups_per_batch + self.pending
        if place >= self.max_steps * self.groups_per_batch:
            return None
        # place < (version + K + 1)·N, solved for the version.
        return place // self.groups_per_batch - self.max_staleness

    def admits(self, version: int) -> bool:
        """Whether a group may start now on a server that holds ``version``."""
        oldest = self.oldest_admitted()
        return oldest is not None and version >= oldest

    def start(self, group: int, version: int) -> int:
        """A group starts on a server that holds ``version``; returns its deadline."""
        deadline = version + self.max_staleness
        self.running[group] = deadline
        self._due[deadline] += 1
        self.pending += 1
        return deadline

    def finish(self, group: int) -> None:
        """A running group has its rollouts and rewards, and stays in the queue."""
        self._ended(self.running.pop(group))

    def drop(self, group: int) -> None:
        """A group leaves the queue without shipping, running or finished."""
        deadline = self.running.pop(group, None)
        if deadline is not None:
            self._ended(deadline)
        self.pending -= 1

    def ship(self) -> None:
        """The batch being formed ships."""
        self.pending -= self.groups_per_batch
        self.next_step += 1

    def must_wait(self) -> bool:
        """Whether the running groups need places of the batch being formed. Looks at no more than K + 1 deadlines."""
        due = 0
        for deadline in sorted(self._due):
            due += self._due[deadline]
            if due > (deadline - self.next_step) * self.groups_per_batch:
                return True
        return False

    def _ended(self, deadline: int) -> None:
        self._due[deadline] -= 1
        if not self._due[deadline]:
            del self._due[deadline]


Group = TypeVar("Group", bound=Queued)


def choose_batch(finished: Collection[Group], gate: Gate) -> list[Group] | None:
    """The groups of the next batch, earliest deadline first and then by id; None while it must wait.

    It waits for N finished groups, and while running ones need its places. Groups are sorted only when they ship.
    """
    if len(finished) < gate.groups_per_batch or gate.must_wait():
        return None
    return sorted(finished, key=lambda group: (group.deadline, group.id))[: gate.groups_per_batch]
