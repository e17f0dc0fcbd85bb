"""The accounting of time: what adds up, and what it adds up to."""

import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.collector.groups import Group
from outrider.collector.pool import Pool
from outrider.collector.stats import Tally
from tests.collector.bare import bare_server, change
from tests.collector.build import group, rollout

KINDS = ["occupy", "vacate", "up", "down", "holds", "doubt", "trust", "drain", "score", "scored"]
events = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.001, 1 / 3, 7.0, 1e5]), st.integers(0, 2), st.sampled_from(KINDS), st.integers(0, 4)
    ),
    max_size=80,
)


class Clock:
    """A clock that goes as fast as a test wants."""

    now = 1e6

    def __call__(self) -> float:
        return self.now


def make_tally(monkeypatch: pytest.MonkeyPatch, servers: int) -> tuple[Clock, Pool, Any, Tally]:
    """A tally over servers and rewards with nothing behind them."""
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    pool = Pool([bare_server() for _ in range(servers)], "run", 1, lambda: None, lambda tokens: "")
    rewards: Any = SimpleNamespace(seconds=0.0, running=0)
    return clock, pool, rewards, Tally(pool, rewards)


@settings(deadline=None)
@given(history=st.lists(events, min_size=1, max_size=3))
def test_states_add_up_to_the_wall_clock(history: list[list[tuple[float, int, str, int]]]) -> None:
    """Over several batches and any history of three servers, against a second bookkeeping."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        clock, pool, rewards, tally = make_tally(monkeypatch, servers=3)
        for step, batch in enumerate(history):
            expected: Counter[str] = Counter()
            for seconds, number, kind, figure in batch:
                clock.now += seconds
                for server in pool.servers:
                    busy = server.alive and server.running > 0
                    expected["busy" if busy else "idle" if server.ready else "down"] += seconds / 3
                if rewards.running and not any(server.running for server in pool.servers):
                    expected["waiting"] += seconds
                if kind in ("score", "scored"):
                    rewards.running = max(0, rewards.running + (1 if kind == "score" else -1))
                    rewards.switched()
                else:
                    change(pool.servers[number], kind, figure)
            stats = tally.batch(step, [group(0)], pack_seconds=0.5, epoch=0.0)
            elapsed = sum(seconds for seconds, *_ in batch)
            parts = (stats.generation_busy_seconds, stats.generation_idle_seconds, stats.generation_down_seconds)
            assert stats.batch_seconds == pytest.approx(elapsed, abs=1e-6)
            assert sum(parts) == pytest.approx(stats.batch_seconds, abs=1e-6)
            for part, state in zip(parts, ("busy", "idle", "down"), strict=True):
                assert part == pytest.approx(expected[state], abs=1e-6)
            assert stats.reward_wait_seconds == pytest.approx(expected["waiting"], abs=1e-6)
            assert 0 <= stats.generation_idle_share <= 1
            if elapsed:
                assert stats.generation_idle_share == pytest.approx(1 - parts[0] / elapsed, abs=1e-6)


def test_staleness_counts_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, _, tally = make_tally(monkeypatch, servers=1)
    rollouts = [rollout([3] * 4, versions=[(5, 1), (7, 3)]), rollout([], versions=[])]
    stats = tally.batch(7, [Group(0, 9, "prompt", rollouts, [0.0, 1.0], {"f": [None, 1.0]})], 0.0, 0.0)
    assert (stats.staleness_mean, stats.staleness_max) == (0.5, 2)
    assert (stats.completion_length, stats.completion_length_max) == (2.0, 4)
    assert stats.rewards == {"f": 1.0}


def test_counts_start_anew_with_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pool, rewards, tally = make_tally(monkeypatch, servers=2)
    for factor in (1, 2):
        tally.failed, tally.tokens = factor, 10 * factor
        pool.servers[0].stage_seconds += factor
        pool.servers[1].commit_seconds += 2 * factor
        rewards.seconds += 3 * factor
        clock.now += 10 * factor
        stats = tally.batch(0, [group(0)], 0.25, 0.5)
        assert (stats.groups_failed, stats.rollout_tokens, stats.batch_seconds) == (factor, 10 * factor, 10 * factor)
        assert (stats.stage_seconds, stats.commit_seconds, stats.reward_seconds) == (factor, 2 * factor, 3 * factor)
        assert (stats.pack_seconds, stats.epoch) == (0.25, 0.5)
