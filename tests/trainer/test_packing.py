import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.contract.feed import Sample, unpack_floats, unpack_ints
from outrider.trainer.packing import collate, form_micro_batches
from tests.trainer.build import sample

LENGTHS = st.lists(st.integers(1, 200), max_size=60)


@given(LENGTHS, st.integers(1, 20), st.none() | st.integers(1, 400))
def test_every_rollout_is_in_one_micro_batch(lengths: list[int], rows: int, budget: int | None) -> None:
    batches = form_micro_batches(lengths, rows, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(batches)


@given(LENGTHS, st.integers(1, 20))
def test_rows_of_a_micro_batch_are_bounded_and_used(lengths: list[int], rows: int) -> None:
    batches = form_micro_batches(lengths, rows, None)
    assert all(len(batch) <= rows for batch in batches)
    assert len(batches) == -(-len(lengths) // rows)


@given(LENGTHS, st.integers(1, 20), st.integers(1, 400))
def test_padded_tokens_keep_the_budget_unless_one_rollout_alone_exceeds_it(
    lengths: list[int], rows: int, budget: int
) -> None:
    for batch in form_micro_batches(lengths, rows, budget):
        padded = len(batch) * max(lengths[index] for index in batch)
        assert padded <= budget or len(batch) == 1


@given(LENGTHS, st.integers(1, 20), st.none() | st.integers(1, 400))
def test_alike_lengths_share_a_micro_batch(lengths: list[int], rows: int, budget: int | None) -> None:
    batches = form_micro_batches(lengths, rows, budget)
    for before, after in itertools.pairwise(batches):
        assert max(lengths[index] for index in before) <= min(lengths[index] for index in after)


TOKENS = st.integers(0, 2**31 - 1)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    completion = draw(st.lists(TOKENS, min_size=1, max_size=8))
    size = len(completion)
    floats = st.floats(-100, 0, width=32)
    return sample(
        draw(st.lists(TOKENS, min_size=1, max_size=8)),
        completion,
        logprobs=draw(st.lists(floats, min_size=size, max_size=size)),
        advantage=draw(st.floats(-5, 5, width=32)),
        mask=draw(st.none() | st.lists(st.integers(0, 1), min_size=size, max_size=size)),
    )


@given(st.lists(samples(), min_size=1, max_size=6))
def test_collate_against_a_walk_over_all_tokens(found: list[Sample]) -> None:
    micro = collate(found, torch.device("cpu"))
    rows, width = micro.input_ids.shape
    assert (rows, width) == (len(found), max((len(s.prompt) + len(s.completion)) // 4 for s in found))
    expected = []
    for row, one in enumerate(found):
        prompt, completion = unpack_ints(one.prompt).tolist(), unpack_ints(one.completion).tolist()
        whole = prompt + completion
        padding = [0] * (width - len(whole))
        assert micro.input_ids[row].tolist() == whole + padding
        assert micro.attention_mask[row].tolist() == [1] * len(whole) + padding
        for place, (token, logprob) in enumerate(zip(completion, unpack_floats(one.logprobs).tolist(), strict=True)):
            if not one.mask or one.mask[place]:
                expected.append((row * width + len(prompt) + place - 1, token, logprob, row))
    flat = (micro.where, micro.targets, micro.rollout_logprobs, micro.sequence)
    assert list(zip(*(tensor.tolist() for tensor in flat), strict=True)) == expected
    assert micro.advantages.tolist() == [one.advantage for one in found]
    assert micro.rows == len(found)


def test_what_predicts_a_token_is_the_place_before_it() -> None:
    micro = collate([sample([7, 8], [9, 10, 11], mask=[1, 0, 1])], torch.device("cpu"))
    assert micro.input_ids[0, micro.where].tolist() == [8, 10]
    assert micro.targets.tolist() == [9, 11]
    assert micro.where.dtype == micro.targets.dtype == micro.sequence.dtype == torch.int64
    assert micro.rollout_logprobs.dtype == micro.advantages.dtype == torch.float32


def test_a_rollout_without_trained_tokens_keeps_its_row() -> None:
    micro = collate([sample([7], [8, 9], mask=[0, 0]), sample([7], [8])], torch.device("cpu"))
    assert micro.rows == 2
    assert micro.sequence.tolist() == [1]
    assert np.array_equal(micro.attention_mask.numpy(), [[1, 1, 1], [1, 1, 0]])
