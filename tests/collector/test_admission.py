"""The gate under histories that hypothesis invents: whatever servers, rewards and disks do, K holds and nothing stops.

The rule in the docstring of ``admission`` is a proof; this is what keeps the code and the proof the same thing.
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.collector import admission
from outrider.collector.admission import Gate, choose_batch


@dataclass
class Waiting:
    """A group as the queue sees it."""

    id: int
    deadline: int
    version: int


@dataclass(frozen=True)
class World:
    """What a run meets. Shares are of all groups; times are in units of the simulated clock."""

    groups_per_batch: int
    max_staleness: int
    max_steps: int
    servers: int
    slots: int
    failures: float
    silent: float
    slow: float
    commit_delay: float
    train_time: float
    ledger_time: float
    seed: int


worlds = st.builds(
    World,
    groups_per_batch=st.integers(1, 5),
    max_staleness=st.integers(0, 4),
    max_steps=st.integers(1, 14),
    servers=st.integers(1, 3),
    slots=st.integers(1, 12),
    failures=st.sampled_from([0.0, 0.1, 0.5]),
    silent=st.sampled_from([0.0, 0.2, 0.6]),
    slow=st.sampled_from([0.0, 0.1, 0.5]),
    commit_delay=st.sampled_from([0.0, 0.5, 5.0, 40.0]),
    train_time=st.sampled_from([0.0, 1.0, 10.0]),
    ledger_time=st.sampled_from([0.0, 0.5, 20.0]),
    seed=st.integers(0, 2**32),
)


class Violation(AssertionError):
    """The run did what it must never do."""


@dataclass
class Simulation:
    """A run on a simulated clock: the collector's use of the gate, a trainer, and servers that lag and jump.

    Servers take published versions after random delays, skipping those that have been overtaken. A trainer trains
    one batch at a time. Groups take random times, of which some are very long, and may fail or turn out silent. A batch
    that has been chosen is written to the ledger before it ships; meanwhile groups start and end.
    """

    world: World
    gate: Gate = field(init=False)
    finished: dict[int, Waiting] = field(default_factory=dict)
    shipped: list[list[Waiting]] = field(default_factory=list)
    writing: bool = False

    def __post_init__(self) -> None:
        world = self.world
        self.gate = Gate(world.groups_per_batch, world.max_staleness, max_steps=world.max_steps)
        self.random = random.Random(world.seed)
        self.versions = [0] * world.servers
        self.load = [0] * world.servers
        self.ids, self.ties = count(), count()
        self.now, self.trainer_free = 0.0, 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []

    def run(self) -> None:
        """To the last batch. Raises Violation."""
        self.act()
        while len(self.shipped) < self.world.max_steps:
            if not self.events:
                raise Violation(f"nothing will ever happen again, after {len(self.shipped)} batches")
            self.now, _, event = heapq.heappop(self.events)
            event()
            self.act()

    def act(self) -> None:
        """What the collector does whenever anything has changed."""
        while not self.writing and self.gate.next_step < self.gate.max_steps:
            chosen = choose_batch(self.finished.values(), self.gate)
            if chosen is None:
                break
            if not self.replace(chosen):
                self.writing = True
                for group in chosen:
                    del self.finished[group.id]
                self.later(self.now + self.world.ledger_time, lambda chosen=chosen: self.ship(chosen))
        self.start()

    def replace(self, chosen: list[Waiting]) -> bool:
        """--dynamic_sample, and batches without signal: finished groups are dropped for others."""
        silent = [group for group in chosen if self.random.random() < self.world.silent]
        for group in silent:
            del self.finished[group.id]
            self.gate.drop(group.id)
        return bool(silent)

    def ship(self, chosen: list[Waiting]) -> None:
        step, world = self.gate.next_step, self.world
        self.writing = False
        if step != len(self.shipped):
            raise Violation(f"batch {step} ships as number {len(self.shipped)}")
        for group in chosen:
            if step - group.version > world.max_staleness:
                raise Violation(f"group {group.id} of version {group.version} ships in step {step}")
        self.gate.ship()
        self.shipped.append(chosen)
        self.trainer_free = max(self.now, self.trainer_free) + world.train_time
        for server in range(world.servers):
            at = self.trainer_free + self.random.uniform(0, world.commit_delay)
            self.later(at, lambda server=server, version=step + 1: self.commit(server, version))

    def commit(self, server: int, version: int) -> None:
        self.versions[server] = max(self.versions[server], version)

    def start(self) -> None:
        while True:
            order = sorted(range(self.world.servers), key=lambda server: (self.load[server], -self.versions[server]))
            free = [server for server in order if self.load[server] < self.world.slots]
            server = next((server for server in free if self.gate.admits(self.versions[server])), None)
            if server is None:
                return
            group, version = next(self.ids), self.versions[server]
            deadline = self.gate.start(group, version)
            self.load[server] += 1
            limit = (self.world.max_staleness + 1) * self.world.groups_per_batch
            if self.gate.pending > limit:
                raise Violation(f"{self.gate.pending} groups are pending, at most {limit} may be")
            took = self.random.expovariate(1.0) * (100.0 if self.random.random() < self.world.slow else 1.0)
            waiting = Waiting(group, deadline, version)
            self.later(self.now + took, lambda server=server, waiting=waiting: self.end(server, waiting))

    def end(self, server: int, group: Waiting) -> None:
        self.load[server] -= 1
        if self.random.random() < self.world.failures:
            self.gate.drop(group.id)
        else:
            self.gate.finish(group.id)
            self.finished[group.id] = group

    def later(self, at: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (at, next(self.ties), event))


@settings(max_examples=400, deadline=None)
@given(world=worlds)
def test_staleness_is_bounded_and_every_batch_ships(world: World) -> None:
    simulation = Simulation(world)
    simulation.run()
    ids = [group.id for batch in simulation.shipped for group in batch]
    assert len(ids) == len(set(ids)) == world.max_steps * world.groups_per_batch


class _Lax(Gate):
    """One batch too many."""

    def admits(self, version: int) -> bool:
        place = self.next_step * self.groups_per_batch + self.pending
        return place < min(version + self.max_staleness + 2, self.max_steps) * self.groups_per_batch


class _Hasty(Gate):
    """Waits for groups only once their deadline has come: right for K = 1, and wrong from K = 2 on."""

    def must_wait(self) -> bool:
        return any(deadline <= self.next_step for deadline in self.running.values())


class _Strict(Gate):
    """One batch too few."""

    def admits(self, version: int) -> bool:
        place = self.next_step * self.groups_per_batch + self.pending
        return place < min(version + self.max_staleness, self.max_steps) * self.groups_per_batch


def _impatient(finished: Any, gate: Gate) -> Any:
    """Ships as soon as there is a batch."""
    ready = sorted(finished, key=lambda group: (group.deadline, group.id))
    return ready[: gate.groups_per_batch] if len(ready) >= gate.groups_per_batch else None


def _latest_first(finished: Any, gate: Gate) -> Any:
    """Ships what has the latest deadline."""
    if admission.choose_batch(finished, gate) is None:
        return None
    return sorted(finished, key=lambda group: (-group.deadline, group.id))[: gate.groups_per_batch]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("Gate", _Lax),
        ("Gate", _Hasty),
        ("Gate", _Strict),
        ("choose_batch", _impatient),
        ("choose_batch", _latest_first),
    ],
)
def test_the_property_can_fail(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any) -> None:
    """A wrong rule is found out: the simulation is a test of the gate and not of itself."""
    monkeypatch.setitem(globals(), name, wrong)
    source = random.Random(1)
    for _ in range(2000):
        world = World(
            groups_per_batch=source.randint(1, 4), max_staleness=source.randint(0, 4), max_steps=12, servers=2,
            slots=12, failures=0.1, silent=0.1, slow=0.3, commit_delay=source.choice([0.0, 5.0]), train_time=1.0,
            ledger_time=source.choice([0.0, 5.0]), seed=source.getrandbits(32),
        )  # fmt: skip
        try:
            Simulation(world).run()
        except Violation:
            return
    pytest.fail("no violation in 2000 runs with a wrong rule")


def test_early_finishers_do_not_take_the_places_of_running_groups() -> None:
    """N = 1, K = 2. The groups 1 and 2 of version 0 have to ship with the batches 1 and 2. If group 3, of version 1,
    shipped with batch 1 because it is there and they are not, one of them would be left for batch 3."""
    gate = Gate(1, 2, max_steps=10)
    for group in range(3):
        assert gate.admits(0)
        gate.start(group, 0)
    assert not gate.admits(0)
    gate.finish(0)
    assert choose_batch([Waiting(0, 2, 0)], gate) == [Waiting(0, 2, 0)]
    gate.ship()
    assert gate.admits(1)
    third = Waiting(3, gate.start(3, 1), 1)
    gate.finish(3)
    assert choose_batch([third], gate) is None
    gate.finish(1)
    assert choose_batch([third, Waiting(1, 2, 0)], gate) == [Waiting(1, 2, 0)]


def test_synchronous_is_k_zero() -> None:
    """K = 0: a batch's groups start on its own version alone, and all of them ship with it."""
    gate = Gate(2, 0, max_steps=3)
    for step in range(3):
        groups = [Waiting(2 * step + i, gate.start(2 * step + i, step), step) for i in range(2) if gate.admits(step)]
        assert len(groups) == 2
        assert not gate.admits(step)
        for group in groups:
            gate.finish(group.id)
        assert choose_batch(groups, gate) == groups
        gate.ship()
        assert not gate.admits(step)
    assert not gate.admits(3), "no group is started for a step that the run does not have"


@given(ahead=st.lists(st.integers(0, 6), max_size=30), size=st.integers(1, 5), step=st.integers(0, 6))
def test_counts_of_running_groups_agree_with_the_groups(ahead: list[int], size: int, step: int) -> None:
    """``must_wait`` reads counts that are kept up to date by every start, finish and drop."""
    deadlines = [step + value for value in ahead]
    gate = Gate(size, 0, next_step=step, max_steps=100)
    for group, deadline in enumerate(deadlines):
        gate.start(group, deadline)
    left = list(enumerate(deadlines))
    while True:
        expected = any(
            sum(deadline <= bound for _, deadline in left) > (bound - step) * size for bound in range(step, step + 8)
        )
        assert gate.must_wait() == expected
        if not left:
            return
        group, _ = left.pop(len(left) // 2)
        gate.finish(group) if group % 2 else gate.drop(group)
