"""What is done to logits before temperature and truncation: biases and penalties, for the few rows that ask for it."""

import numpy as np
import torch
from torch import Tensor

from outrider.server.torch_engine.slots import Slots


def adjust(logits: Tensor, rows: np.ndarray, slots: Slots) -> None:
    """Change, in place, the logits of those of ``rows`` (slots, int64 [n]) that are special. logits [n, vocabulary].

    Each row by itself, so that a sequence's logits do not depend on its neighbours.
    """
    for place in np.flatnonzero(slots.special[rows]):
        slot = int(rows[place])
        sequence, row = slots.occupants[slot], logits[place]
        sampling, count = sequence.request.sampling, int(slots.generated[slot])
        if sampling.logit_bias:
            ids, values = zip(*sampling.logit_bias, strict=True)
            row[torch.tensor(ids, device=row.device)] += torch.tensor(values, dtype=row.dtype, device=row.device)
        drawn = torch.from_numpy(slots.out_tokens[slot, :count].astype(np.int64)).to(row.device)
        if sampling.repetition_penalty != 1.0:
            prompt = torch.from_numpy(sequence.request.prompt).to(row.device)
            penalize_repetition(row, torch.cat([prompt, drawn]), sampling.repetition_penalty)
        if count and (sampling.presence_penalty or sampling.frequency_penalty):
            penalize_occurrences(row, drawn, sampling.presence_penalty, sampling.frequency_penalty)
        if count < sampling.min_tokens:
            stops = slots.stops[slot]
            row[torch.from_numpy(stops[stops >= 0]).to(row.device)] = float("-inf")


def penalize_repetition(row: Tensor, seen: Tensor, penalty: float) -> None:
    """Divide the positive and multiply the negative logits of ``seen`` tokens (Keskar et al. 2019, arXiv:1909.05858,
    section 4.1). row [vocabulary], seen int64 [n]; in place."""
    ids = seen.unique()
    chosen = row[ids]
    row[ids] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)


def penalize_occurrences(row: Tensor, drawn: Tensor, presence: float, frequency: float) -> None:
    """Take ``presence`` once, and ``frequency`` for each occurrence, from the logits of ``drawn`` tokens (OpenAI API).
    row [vocabulary], drawn int64 [n]; in place."""
    ids, counts = drawn.unique(return_counts=True)
    row[ids] -= presence + frequency * counts.to(row.dtype)
