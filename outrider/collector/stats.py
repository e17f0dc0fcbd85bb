"""What the collector counts between two batches."""

import time
from collections.abc import Iterable, Sequence

import numpy as np

from outrider.collector.clock import StateClock
from outrider.collector.groups import Group
from outrider.collector.pool import Pool
from outrider.collector.reward_runner import RewardRunner
from outrider.collector.server import SERVER_STATES, Server
from outrider.contract.feed import BatchStats
from outrider.contract.generation import VersionSpan


class Tally:
    """Counts since the latest batch, and the rates that follow from them."""

    def __init__(self, pool: Pool, rewards: RewardRunner) -> None:
        self.pool, self.rewards = pool, rewards
        self.zero_variance = self.failed = self.stale = self.rejected = self.tokens = 0
        self._reward_wait = StateClock(("waiting", "not waiting"), "not waiting")
        pool.switched = rewards.switched = self._switch
        self.restart(time.monotonic())

    def restart(self, now: float) -> None:
        """Count from ``now`` (of ``time.monotonic``) on."""
        self.zero_variance = self.failed = self.stale = self.rejected = self.tokens = 0
        self._since, self._before = now, self._totals(now)

    def batch(self, step: int, groups: Sequence[Group], pack_seconds: float, epoch: float) -> BatchStats:
        """Statistics of the batch of ``step``; the counting starts anew. pack_seconds: spent on this batch."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        rewards = np.asarray([group.rewards for group in groups])
        lengths = np.asarray([len(rollout.tokens) for rollout in rollouts])
        staleness_mean, staleness_max = _staleness(step, (span for rollout in rollouts for span in rollout.versions))
        per_function: dict[str, float] = {}
        for name in groups[0].per_function:
            given = [value for group in groups for value in group.per_function[name] if value is not None]
            per_function[name] = float(np.mean(given)) if given else float("nan")
        now = time.monotonic()
        elapsed, since = now - self._since, self._totals(now) - self._before
        busy, idle, down, reward, reward_wait, stage, commit = since.tolist()
        stats = BatchStats(
            reward=float(rewards.mean()),
            reward_std=float(rewards.std(axis=1, ddof=1).mean()),
            rewards=per_function,
            completion_length=float(lengths.mean()),
            completion_length_max=int(lengths.max()),
            truncated_share=float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
            staleness_mean=staleness_mean,
            staleness_max=staleness_max,
            groups=len(groups),
            groups_zero_variance=self.zero_variance,
            groups_failed=self.failed,
            groups_stale=self.stale,
            prompts_rejected=self.rejected,
            rollout_tokens=self.tokens,
            batch_seconds=elapsed,
            generation_busy_seconds=busy,
            generation_idle_seconds=idle,
            generation_down_seconds=down,
            generation_idle_share=idle_share(busy, elapsed),
            reward_seconds=reward,
            reward_wait_seconds=reward_wait,
            stage_seconds=stage,
            commit_seconds=commit,
            pack_seconds=pack_seconds,
            epoch=epoch,
        )
        self.restart(now)
        return stats

    def _totals(self, now: float) -> np.ndarray:
        """Seconds since the start, in the order in which :meth:`batch` reads them."""
        servers = self.pool.servers
        return np.array(
            [
                *(mean_seconds(servers, state, now) for state in SERVER_STATES),
                self.rewards.seconds,
                self._reward_wait.seconds("waiting", now),
                sum(server.stage_seconds for server in servers),
                sum(server.commit_seconds for server in servers),
            ]
        )

    def _switch(self) -> None:
        """Whether anything is in flight, or being scored, is otherwise than before."""
        waiting = self.rewards.running > 0 and not self.pool.busy
        self._reward_wait.enter("waiting" if waiting else "not waiting")


def mean_seconds(servers: Sequence[Server], state: str, now: float) -> float:
    """Seconds until ``now`` that a server has spent in a state, mean over the servers."""
    return sum(server.clock.seconds(state, now) for server in servers) / len(servers)


def idle_share(busy: float, elapsed: float) -> float:
    """Share of the time in which a server had nothing in flight."""
    return min(1.0, max(0.0, 1.0 - busy / elapsed)) if elapsed > 0 else 0.0


def _staleness(step: int, spans: Iterable[VersionSpan]) -> tuple[float, int]:
    """Mean and maximum over all tokens of the versions between sampling and ``step``."""
    tokens = total = 0
    oldest = step
    for version, count in spans:
        tokens += count
        total += (step - version) * count
        oldest = min(oldest, version)
    return total / tokens if tokens else 0.0, step - oldest
