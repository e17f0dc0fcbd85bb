"""A finished group, and what a batch of them looks like to the trainer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from outrider.algorithm.advantages import ScaleRewards, group_advantages, has_signal
from outrider.contract.arrays import pack_floats, pack_ints
from outrider.contract.feed import Sample
from outrider.environments.base import Rollout


@dataclass
class Group:
    """The rollouts of one prompt, scored. rewards: the weighted sums, one a rollout; per_function: by name.

    deadline: the last batch it may ship with, see ``admission``.
    """

    id: int
    deadline: int
    prompt: str
    rollouts: list[Rollout]
    rewards: list[float]
    per_function: dict[str, list[float | None]]
    advantages: list[float] = field(default_factory=list)

    @property
    def oldest_version(self) -> int:
        """Version of the oldest token."""
        return min((version for r in self.rollouts for version, _ in r.versions), default=self.deadline)

    @property
    def tokens(self) -> int:
        """Tokens that the policy sampled."""
        return sum(trained_tokens(rollout) for rollout in self.rollouts)

    @cached_property
    def has_signal(self) -> bool:
        return has_signal(np.asarray(self.rewards))


def trained_tokens(rollout: Rollout) -> int:
    """Tokens of a rollout that are trained: those that the policy sampled."""
    return len(rollout.tokens) if rollout.mask is None else sum(rollout.mask)


def set_advantages(groups: Sequence[Group], scale_rewards: ScaleRewards) -> None:
    """Fill in the advantages of a batch's groups."""
    rewards = np.asarray([group.rewards for group in groups], dtype=np.float64)
    for group, row in zip(groups, group_advantages(rewards, scale_rewards), strict=True):
        group.advantages = row.tolist()


def samples_of(groups: Sequence[Group]) -> list[Sample]:
    """The rollouts of groups as the trainer gets them; rollouts without a token are left out."""
    return [
        Sample(
            group=group.id,
            prompt=pack_ints(rollout.prompt),
            completion=pack_ints(rollout.tokens),
            logprobs=pack_floats(rollout.logprobs),
            advantage=advantage,
            mask=b"" if rollout.mask is None else bytes(rollout.mask),
        )
        for group in groups
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True)
        if len(rollout.tokens)
    ]
