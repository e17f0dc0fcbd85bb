import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.contract.arrays import unpack_floats, unpack_ints
from outrider.contract.feed import Sample
from outrider.trainer.packing import collate, form_micro_batches, share_out
from outrider.trainer.sharing import PADDING, PROMPT, Sharing
from tests.trainer.build import one_a_row, sample

CPU = torch.device("cpu")


@st.composite
def groups(draw: st.DrawFn) -> list[Sample]:
    """Rollouts of up to six prompts, some of which are the same."""
    prompts = draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=20), max_size=6))
    lengths = st.lists(st.integers(1, 30), min_size=1, max_size=9)
    return [sample(prompt, [7] * length) for prompt in prompts for length in draw(lengths)]


SHARING = st.none() | st.builds(Sharing, st.sampled_from([0.0, 20.0, 1e9]), st.none() | st.integers(1, 50))
BUDGET = st.none() | st.integers(1, 200)


def width(samples: list[Sample], row: list[int]) -> int:
    return len(samples[row[0]].prompt) // 4 + sum(len(samples[index].completion) // 4 - 1 for index in row)


@given(groups(), st.integers(1, 20), BUDGET, SHARING)
def test_every_rollout_is_in_one_row(samples: list[Sample], rows: int, budget: int | None, sharing: Sharing) -> None:
    batches = form_micro_batches(samples, rows, budget, sharing)
    assert sorted(index for batch in batches for row in batch for index in row) == list(range(len(samples)))
    assert all(batch and all(batch) for batch in batches)


@given(groups(), st.integers(1, 20), BUDGET, SHARING)
def test_a_row_has_one_prompt(samples: list[Sample], rows: int, budget: int | None, sharing: Sharing) -> None:
    for row in itertools.chain(*form_micro_batches(samples, rows, budget, sharing)):
        assert len({samples[index].prompt for index in row}) == 1


@given(groups(), st.integers(1, 20))
def test_without_sharing_micro_batches_are_full(samples: list[Sample], rows: int) -> None:
    batches = form_micro_batches(samples, rows, None, None)
    assert all(len(row) == 1 for batch in batches for row in batch)
    assert len(batches) == -(-len(samples) // rows)


@given(groups(), st.integers(1, 20), SHARING)
def test_rollouts_of_a_micro_batch_are_bounded(samples: list[Sample], rows: int, sharing: Sharing) -> None:
    for batch in form_micro_batches(samples, rows, None, sharing):
        assert sum(map(len, batch)) <= rows


@given(groups(), st.integers(1, 200), SHARING)
def test_padded_tokens_keep_the_budget_unless_one_rollout_alone_exceeds_it(
    samples: list[Sample], budget: int, sharing: Sharing
) -> None:
    for batch in form_micro_batches(samples, 8, budget, sharing):
        padded = len(batch) * max(width(samples, row) for row in batch)
        assert padded <= budget or (len(batch) == 1 and len(batch[0]) == 1)


@given(groups(), st.integers(1, 20), BUDGET, SHARING.filter(lambda sharing: sharing is None or sharing.window is None))
def test_alike_widths_share_a_micro_batch(
    samples: list[Sample], rows: int, budget: int | None, sharing: Sharing
) -> None:
    batches = form_micro_batches(samples, rows, budget, sharing)
    for before, after in itertools.pairwise(batches):
        assert max(width(samples, row) for row in before) <= min(width(samples, row) for row in after)


@given(groups(), st.integers(1, 50))
def test_what_a_window_cuts_stays_alone_in_a_micro_batch_of_its_like(samples: list[Sample], window: int) -> None:
    cut = {i for i, s in enumerate(samples) if (len(s.prompt) + len(s.completion)) // 4 > window}
    for batch in form_micro_batches(samples, 20, None, Sharing(1e9, window)):
        inside = {index for row in batch for index in row}
        assert inside <= cut or not inside & cut
        assert not inside & cut or all(len(row) == 1 for row in batch)


def cost(row_width: int, break_even: float) -> float:
    return row_width + row_width**2 / break_even


@given(st.integers(1, 60), st.integers(2, 60), st.floats(1.0, 1e4))
def test_the_next_rollout_joins_a_row_where_that_is_cheaper(prompt: int, length: int, break_even: float) -> None:
    samples = [sample([1] * prompt, [2] * length) for _ in range(2)]
    (rows,) = form_micro_batches(samples, 8, None, Sharing(break_even, None))
    together, apart = cost(prompt + 2 * (length - 1), break_even), 2 * cost(prompt + length - 1, break_even)
    assert together == pytest.approx(apart) or (len(rows) == 1) == (together < apart)


def test_a_group_larger_than_a_micro_batch_is_divided() -> None:
    samples = [sample([1] * 50, [2, 3]) for _ in range(10)]
    batches = form_micro_batches(samples, 4, None, Sharing(1e9, None))
    assert sorted(len(row) for batch in batches for row in batch) == [2, 4, 4]


TOKENS = st.integers(0, 2**31 - 1)


@st.composite
def rows_of_samples(draw: st.DrawFn) -> list[list[Sample]]:
    def rollout(prompt: list[int]) -> Sample:
        completion = draw(st.lists(TOKENS, min_size=1, max_size=8))
        size = len(completion)
        floats = st.floats(-100, 0, width=32)
        return sample(
            prompt,
            completion,
            logprobs=draw(st.lists(floats, min_size=size, max_size=size)),
            advantage=draw(st.floats(-5, 5, width=32)),
            mask=draw(st.none() | st.lists(st.integers(0, 1), min_size=size, max_size=size)),
        )

    prompts = draw(st.lists(st.lists(TOKENS, min_size=1, max_size=8), min_size=1, max_size=4))
    return [[rollout(prompt) for _ in range(draw(st.integers(1, 3)))] for prompt in prompts]


@given(rows_of_samples())
def test_collate_against_a_walk_over_all_tokens(rows: list[list[Sample]]) -> None:
    micro = collate(rows, CPU)
    count, wide = micro.input_ids.shape
    samples = [one for row in rows for one in row]
    assert (count, wide) == (len(rows), max(width(row, list(range(len(row)))) for row in rows))
    expected, sequence = [], 0
    for at, row in enumerate(rows):
        prompt = unpack_ints(row[0].prompt).tolist()
        ids, positions, part = list(prompt), list(range(len(prompt))), [PROMPT] * len(prompt)
        for number, one in enumerate(row, 1):
            completion, last = unpack_ints(one.completion).tolist(), at * wide + len(prompt) - 1
            logprobs = unpack_floats(one.logprobs).tolist()
            for place, (token, logprob) in enumerate(zip(completion, logprobs, strict=True)):
                if not one.mask or one.mask[place]:
                    expected.append((last, token, logprob, sequence))
                last = at * wide + len(ids)
                if place < len(completion) - 1:
                    ids.append(token)
                    positions.append(len(prompt) + place)
                    part.append(number)
            sequence += 1
        padding = wide - len(ids)
        assert micro.input_ids[at].tolist() == ids + [0] * padding
        assert micro.positions[at].tolist() == positions + [0] * padding
        assert micro.layout.part[at].tolist() == part + [PADDING] * padding
    flat = (micro.where, micro.targets, micro.rollout_logprobs, micro.sequence)
    assert list(zip(*(tensor.tolist() for tensor in flat), strict=True)) == expected
    assert micro.advantages.tolist() == [one.advantage for one in samples]
    assert micro.rollouts == len(samples)
    assert micro.layout.shared == any(len(row) > 1 for row in rows)


def test_what_predicts_a_token_is_the_place_before_it_in_its_own_rollout() -> None:
    micro = collate([[sample([7, 8], [9, 10, 11], mask=[1, 0, 1]), sample([7, 8], [12, 13])]], CPU)
    assert micro.input_ids.tolist() == [[7, 8, 9, 10, 12]]
    assert micro.input_ids[0, micro.where].tolist() == [8, 10, 8, 12]
    assert micro.targets.tolist() == [9, 11, 12, 13]
    assert micro.where.dtype == micro.targets.dtype == micro.sequence.dtype == torch.int64
    assert micro.rollout_logprobs.dtype == micro.advantages.dtype == torch.float32


def test_a_rollout_without_trained_tokens_keeps_its_place() -> None:
    micro = one_a_row([sample([7], [8, 9], mask=[0, 0]), sample([7], [8])])
    assert micro.rollouts == 2
    assert micro.sequence.tolist() == [1]
    assert np.array_equal(micro.layout.part.numpy(), [[PROMPT, 1], [PROMPT, PADDING]])


def realistic_mix() -> list[Sample]:
    """Prompts of 60 to 300 tokens, eight completions each: many of some hundreds of tokens, and a long tail."""
    draw = np.random.default_rng(1)
    samples = []
    for _ in range(32):
        prompt = draw.integers(2, 99, int(draw.integers(60, 300)))
        samples += [sample(prompt, [5] * int(min(draw.lognormal(6.0, 0.7) + 1, 2048))) for _ in range(8)]
    return samples


@pytest.mark.parametrize("max_tokens", [None, 4096, 8192])
@pytest.mark.parametrize("break_even", [None, 1500.0])
def test_little_is_padded_of_a_realistic_mix(max_tokens: int | None, break_even: float | None) -> None:
    samples = realistic_mix()
    sharing = None if break_even is None else Sharing(break_even, None)
    filled = places = 0
    for rows in form_micro_batches(samples, 8, max_tokens, sharing):
        part = collate([[samples[index] for index in row] for row in rows], CPU).layout.part
        filled, places = filled + int((part != PADDING).sum()), places + part.numel()
    assert filled >= 0.9 * places


def costs(samples: list[Sample], shared: list[list[list[list[int]] | None]], break_even: float) -> np.ndarray:
    """What the micro-batches of each rank cost, 0 for none: [ranks, rounds]."""
    return np.array(
        [[sum(cost(width(samples, row), break_even) for row in rows or ()) for rows in of_rank] for of_rank in shared]
    )


@given(
    groups(), st.integers(1, 20), BUDGET, SHARING, st.integers(2, 5), st.sampled_from([1.0, 20.0, 1e9]), st.randoms()
)
def test_ranks_have_as_many_micro_batches_and_alike_ones_at_a_time(
    samples: list[Sample], rows: int, budget: int | None, sharing: Sharing, ranks: int, break_even: float, order: Any
) -> None:
    formed = form_micro_batches(samples, rows, budget, sharing)
    order.shuffle(formed)
    shared = share_out(formed, samples, ranks, break_even)
    found = [row for of_rank in shared for rows_of in of_rank if rows_of is not None for row in rows_of]
    assert sorted(found) == sorted(row for batch in formed for row in batch), "no row is lost, doubled or cut"
    assert len({len(of_rank) for of_rank in shared}) == 1
    assert len(shared) == ranks
    idle = [at for of_rank in shared for at, rows_of in enumerate(of_rank) if rows_of is None]
    assert set(idle) <= {len(shared[0]) - 1}, "only in the last round"
    assert len(idle) < ranks
    if idle:
        assert all(rows_of is None or len(rows_of) == 1 for of_rank in shared for rows_of in of_rank), "nothing to cut"
    of = costs(samples, shared, break_even)
    whole = of[:, :-1] if idle else of
    assert all(before.max() <= after.min() for before, after in itertools.pairwise(whole.T))
    for number, together in enumerate(whole.T):
        assert list(together) == sorted(together, reverse=number % 2 == 1), "nobody has the cheapest of every round"


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_have_alike_work_of_a_realistic_mix(ranks: int) -> None:
    """In tokens it would not be alike: attention makes the long rollouts dearer than their number says."""
    samples, break_even = realistic_mix(), 1500.0
    formed = form_micro_batches(samples, 8, None, Sharing(break_even, None))
    of = costs(samples, share_out(formed, samples, ranks, break_even), break_even)
    assert of.sum(axis=1).max() <= 1.1 * of.sum(axis=1).min()
    # In each round the ranks wait for the slowest of them.
    assert ranks * of.max(axis=0).sum() <= 1.12 * of.sum()
