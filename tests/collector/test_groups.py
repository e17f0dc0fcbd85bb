"""How a batch is shared out over optimizer steps."""

import random

from hypothesis import given
from hypothesis import strategies as st

from outrider.collector.groups import Group, mini_batches, set_advantages, trained_tokens
from outrider.contract.feed import MiniBatch, Sample
from tests.collector.build import rollout

SILENT = (0.5, 0.5, 0.5, 0.5)


def make_groups(rewards: list[tuple[float, ...]]) -> list[Group]:
    """Groups of four rollouts, each rollout known by its tokens; every third has none, or some of another's."""
    groups = []
    for number, given_rewards in enumerate(rewards):
        rollouts = []
        for place in range(4):
            index = 4 * number + place
            tokens = [] if index % 11 == 10 else [index + 3, *range(3, 3 + index % 5)]
            mask = [1] + [0] * (len(tokens) - 1) if index % 3 == 2 and tokens else None
            rollouts.append(rollout(tokens, mask=mask))
        groups.append(Group(7 * number, 0, f"prompt {number}", rollouts, list(given_rewards), {}))
    set_advantages(groups, "group")
    return groups


def keys(parts: list[MiniBatch]) -> list[list[tuple[int, bytes]]]:
    return [[(sample.group, sample.completion) for sample in part.samples] for part in parts]


def known(sample: Sample) -> tuple[int, bytes, float]:
    return sample.group, sample.completion, sample.advantage


rewards = st.lists(st.sampled_from([SILENT, (0.0, 1.0, 1.0, 0.0), (1.0, 0.0, 0.25, 0.0)]), min_size=1, max_size=12)


@given(rewards, st.integers(1, 6), st.integers(0, 3), st.booleans())
def test_every_rollout_is_in_one_part(
    given_rewards: list[tuple[float, ...]], count: int, seed: int, drop: bool
) -> None:
    groups = make_groups(given_rewards)
    parts = mini_batches(groups, count, str(seed), drop)
    rollouts = [(group, place) for group in groups for place in range(4)]
    assert sorted(known(sample) for part in parts for sample in part.samples) == sorted(
        known(sample) for sample in mini_batches(groups, 1, "another", drop)[0].samples
    )
    sent = [g for g, place in rollouts if len(g.rollouts[place].tokens) and (g.has_signal or not drop)]
    assert sum(len(part.samples) for part in parts) == len(sent)
    # What is not sent is counted.
    assert sum(part.sequences for part in parts) == len(rollouts)
    assert max(part.sequences for part in parts) - min(part.sequences for part in parts) <= (len(rollouts) % count > 0)
    assert sum(part.tokens for part in parts) == sum(trained_tokens(g.rollouts[place]) for g, place in rollouts)
    # A cut goes through one group at most.
    in_parts = [{sample.group for sample in part.samples} for part in parts]
    assert sum(map(len, in_parts)) - len(set().union(*in_parts)) <= count - 1


@given(rewards, st.integers(1, 4), st.integers(0, 3))
def test_the_parts_follow_from_the_seed_alone(given_rewards: list[tuple[float, ...]], count: int, seed: int) -> None:
    """Not from the order in which groups were finished, or come from the ledger."""
    groups = make_groups(given_rewards)
    expected = mini_batches(groups, count, f"0/batch {seed}", True)
    random.shuffle(groups)
    assert mini_batches(groups, count, f"0/batch {seed}", True) == expected


def test_batches_are_mixed_differently() -> None:
    groups = make_groups([(0.0, 1.0, 1.0, 0.0)] * 8)
    first, second = (keys(mini_batches(groups, 2, f"0/batch {number}", True)) for number in range(2))
    assert first != second
