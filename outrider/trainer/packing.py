"""Which rollouts share a micro-batch, and the tensors that they become."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from outrider.contract.feed import Sample, unpack_floats, unpack_ints


@dataclass
class MicroBatch:
    """Rollouts as padded rows, and their trained tokens as flat vectors.

    input_ids, attention_mask: int64 [rows, width], padded on the right. where: int64 [tokens], places of the hidden
    states that predict the trained tokens in the flattened [rows x width]. targets, rollout_logprobs, sequence:
    [tokens]; sequence is the row a token belongs to. advantages: float32 [rows].
    """

    input_ids: Tensor
    attention_mask: Tensor
    where: Tensor
    targets: Tensor
    rollout_logprobs: Tensor
    sequence: Tensor
    advantages: Tensor

    @property
    def rows(self) -> int:
        return self.input_ids.shape[0]


def form_micro_batches(lengths: Sequence[int], rows: int, max_tokens: int | None) -> list[list[int]]:
    """Share out rollouts over micro-batches, alike lengths together so that little is padded.

    lengths: tokens of each rollout, prompt included. rows: rollouts of a micro-batch, unless ``max_tokens`` gives a
    budget of padded tokens (a single longer rollout still gets a micro-batch of its own). Returns indices.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    batches: list[list[int]] = []
    current: list[int] = []
    for index in order:
        # In ascending order the newest is the longest, and its length is the width.
        full = len(current) >= rows if max_tokens is None else (len(current) + 1) * lengths[index] > max_tokens
        if current and full:
            batches.append(current)
            current = []
        current.append(index)
    if current:
        batches.append(current)
    return batches


def collate(samples: Sequence[Sample], device: torch.device) -> MicroBatch:
    """The tensors of one micro-batch."""
    prompts = [unpack_ints(sample.prompt) for sample in samples]
    completions = [unpack_ints(sample.completion) for sample in samples]
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids = np.zeros((len(samples), width), dtype=np.int64)
    mask = np.zeros((len(samples), width), dtype=np.int64)
    where, targets, logprobs, sequence = [], [], [], []
    for row, (sample, prompt, completion) in enumerate(zip(samples, prompts, completions, strict=True)):
        start, end = len(prompt), len(prompt) + len(completion)
        ids[row, :start], ids[row, start:end] = prompt, completion
        mask[row, :end] = 1
        trained = np.arange(len(completion))
        if sample.mask:
            trained = np.flatnonzero(np.frombuffer(sample.mask, dtype=np.uint8))
        # The hidden state one place earlier predicts a token.
        where.append(row * width + start - 1 + trained)
        targets.append(completion[trained])
        logprobs.append(unpack_floats(sample.logprobs)[trained])
        sequence.append(np.full(len(trained), row))

    def tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)

    return MicroBatch(
        input_ids=tensor(ids, torch.long),
        attention_mask=tensor(mask, torch.long),
        where=tensor(np.concatenate(where), torch.long),
        targets=tensor(np.concatenate(targets), torch.long),
        rollout_logprobs=tensor(np.concatenate(logprobs), torch.float32),
        sequence=tensor(np.concatenate(sequence), torch.long),
        advantages=tensor(np.array([sample.advantage for sample in samples]), torch.float32),
    )
