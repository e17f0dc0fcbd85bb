"""A finished group, and what a batch of them looks like to the trainer."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np

from outrider.algorithm.advantages import ScaleRewards, group_advantages, has_signal
from outrider.contract.arrays import pack_floats, pack_ints
from outrider.contract.feed import MiniBatch, Sample
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


def mini_batches(groups: Sequence[Group], count: int, seed: str, drop_zero_variance: bool) -> list[MiniBatch]:
    """Share out the rollouts of a batch over ``count`` optimizer steps, as many for each.

    The groups are shuffled, their rollouts laid in a row, and the row is cut: a group is trained in one step, but where
    a cut falls into it. This depends on the ids of the groups and on ``seed`` alone, and so a batch that is replayed is
    shared out as it was. drop_zero_variance: groups without signal are counted and not sent. Rollouts without a token
    are counted, too.
    """
    order = sorted(groups, key=lambda group: group.id)
    random.Random(seed).shuffle(order)
    row = [(group, place) for group in order for place in range(len(group.rollouts))]
    cuts = [len(row) * step // count for step in range(count + 1)]
    return [
        MiniBatch(
            samples=[
                _sample(group, place)
                for group, place in part
                if len(group.rollouts[place].tokens) and (group.has_signal or not drop_zero_variance)
            ],
            sequences=len(part),
            tokens=sum(trained_tokens(group.rollouts[place]) for group, place in part),
        )
        for part in (row[begin:end] for begin, end in pairwise(cuts))
    ]


def _sample(group: Group, place: int) -> Sample:
    rollout = group.rollouts[place]
    return Sample(
        group=group.id,
        prompt=pack_ints(rollout.prompt),
        completion=pack_ints(rollout.tokens),
        logprobs=pack_floats(rollout.logprobs),
        advantage=group.advantages[place],
        mask=b"" if rollout.mask is None else bytes(rollout.mask),
    )
