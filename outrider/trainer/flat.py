"""Micro-batches without padding: rollouts one after the other, for attention that knows where each begins."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from outrider.contract.arrays import unpack_ints
from outrider.contract.feed import Sample
from outrider.trainer.packing import Flat, MicroBatch, Trained, length_of

#: The number of tokens is brought to a multiple of this, so that matrix products have the sizes that GPUs like.
_MULTIPLE = 128
#: The longest sequence is told in multiples of this, so that few different numbers occur.
_LONGEST = 512


def form_flat(
    samples: Sequence[Sample], rollouts: int, max_tokens: int | None, ranks: int, break_even: float
) -> list[list[list[int]]]:
    """Share out rollouts over as few micro-batches as hold them, which cost about as much, attention included; as many
    for each rank, unless there are too few rollouts.

    rollouts: of a micro-batch, unless ``max_tokens`` gives a budget of tokens (a single longer rollout still gets a
    micro-batch of its own). break_even: see ``Sharing``. Returns micro-batches of rows of one index.
    """
    lengths = [length_of(sample) for sample in samples]
    least = -(-len(samples) // rollouts) if max_tokens is None else -(-sum(lengths) // max_tokens)
    count = max(1, -(-least // ranks)) * ranks
    while True:
        # By tokens, which are alike then, a budget is filled where by costs some rollouts have no room.
        for even in (break_even, math.inf):
            found = _balanced(lengths, count, rollouts, max_tokens, even)
            if found is not None:
                return [[[index] for index in sorted(batch)] for batch in found if batch]
        count += ranks


def _balanced(
    lengths: list[int], count: int, rollouts: int, max_tokens: int | None, break_even: float
) -> list[list[int]] | None:
    """Longest first, each to the cheapest that has room; None where one finds no room."""
    batches: list[list[int]] = [[] for _ in range(count)]
    costs, tokens = [0.0] * count, [0] * count
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]

        def has_room(n: int, length: int = length) -> bool:
            if max_tokens is None:
                return len(batches[n]) < rollouts
            return not batches[n] or tokens[n] + length <= max_tokens

        at = min(filter(has_room, range(count)), key=lambda n: (costs[n], n), default=None)
        if at is None:
            return None
        batches[at].append(index)
        costs[at] += length + length * length / break_even
        tokens[at] += length
    return batches


def collate_flat(samples: Sequence[Sample], device: torch.device) -> MicroBatch:
    """The tensors of one micro-batch."""
    lengths = [length_of(sample) for sample in samples]
    total = sum(lengths)
    padded = -(-total // _MULTIPLE) * _MULTIPLE
    ids, positions = np.zeros((1, padded), dtype=np.int64), np.zeros((1, padded), dtype=np.int64)
    trained = Trained()
    end = 0
    for sample, length in zip(samples, lengths, strict=True):
        prompt, completion = unpack_ints(sample.prompt), unpack_ints(sample.completion)
        start, end = end, end + length
        ids[0, start : start + len(prompt)] = prompt
        ids[0, start + len(prompt) : end] = completion[:-1]
        positions[0, start:end] = np.arange(length)
        # The hidden state of the token before predicts a token.
        trained.add(sample, completion, np.arange(start + len(prompt) - 1, end))
    bounds = np.cumsum([0, *lengths])
    if padded > total:  # the filling is a sequence of its own
        bounds = np.append(bounds, padded)
        positions[0, total:] = np.arange(padded - total)
    longest = -(-max(*lengths, padded - total) // _LONGEST) * _LONGEST
    layout = Flat(torch.from_numpy(bounds.astype(np.int32)).to(device), longest)
    return trained.micro_batch(ids, positions, layout, samples, device)
