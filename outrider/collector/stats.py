"""What the collector counts between two batches."""

import time
from collections.abc import Sequence

import numpy as np

from outrider.collector.groups import Group
from outrider.collector.pool import Server
from outrider.contract.feed import BatchStats, version_span_array


class Tally:
    """Counts since the latest batch, and the rates that follow from them."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self.servers = servers
        self.zero_variance = self.failed = self.stale = self.rejected = self.tokens = 0
        self._since = time.monotonic()
        self._before = self._totals(0.0)

    def batch(self, step: int, groups: Sequence[Group], reward_seconds: float, epoch: float) -> BatchStats:
        """Statistics of the batch of ``step``; the counting starts anew. reward_seconds: since the start."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        rewards = np.asarray([group.rewards for group in groups])
        lengths = np.asarray([len(rollout.tokens) for rollout in rollouts])
        versions = np.concatenate([version_span_array(rollout.versions) for rollout in rollouts])
        staleness = step - versions if len(versions) else np.zeros(1)
        per_function: dict[str, float] = {}
        for name in groups[0].per_function:
            given = [value for group in groups for value in group.per_function[name] if value is not None]
            per_function[name] = float(np.mean(given)) if given else float("nan")
        now, totals = time.monotonic(), self._totals(reward_seconds)
        elapsed = max(now - self._since, 1e-9)
        idle, stage, commit, reward = (after - before for after, before in zip(totals, self._before, strict=True))
        stats = BatchStats(
            reward=float(rewards.mean()),
            reward_std=float(rewards.std(axis=1, ddof=1).mean()),
            rewards=per_function,
            completion_length=float(lengths.mean()),
            completion_length_max=int(lengths.max()),
            truncated_share=float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
            staleness_mean=float(staleness.mean()),
            staleness_max=int(staleness.max()),
            groups=len(groups),
            groups_zero_variance=self.zero_variance,
            groups_failed=self.failed,
            groups_stale=self.stale,
            prompts_rejected=self.rejected,
            rollout_tokens=self.tokens,
            generation_idle_share=min(1.0, idle / elapsed / max(1, len(self.servers))),
            reward_seconds=reward,
            stage_seconds=stage,
            commit_seconds=commit,
            epoch=epoch,
        )
        self.zero_variance = self.failed = self.stale = self.rejected = self.tokens = 0
        self._since, self._before = now, totals
        return stats

    def _totals(self, reward_seconds: float) -> tuple[float, float, float, float]:
        return (
            sum(server.idle_seconds() for server in self.servers),
            sum(server.stage_seconds for server in self.servers),
            sum(server.commit_seconds for server in self.servers),
            reward_seconds,
        )
