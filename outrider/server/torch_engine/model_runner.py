"""Runs the Hugging Face model over one step's tokens."""

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from outrider.server.torch_engine.attention import Span, StepLayout
from outrider.server.torch_engine.cache import SlotCache
from outrider.server.torch_engine.scheduler import StepPlan
from outrider.server.torch_engine.slots import Slots

#: Both sides of every matrix product that vary from step to step are padded to a multiple of this. Only then do the
#: CPU's matrix kernels give a row the same bits whatever stands beside it, and a sequence's tokens do not depend on
#: its neighbours.
ROW_MULTIPLE = 16


class ModelRunner:
    """One forward pass for the decoding slots and the prompt chunks of a step."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache, slots: Slots) -> None:
        self.model, self.cache, self.slots = model, cache, slots
        self.device = model.device

    def forward(self, plan: StepPlan) -> tuple[Tensor, np.ndarray]:
        """Compute a step and put its keys and values into the cache.

        Returns logits float32 [rows, vocabulary] and the slots they belong to, int64 [rows]: every decoding slot
        and every prefilling one whose prompt ends in this step. Lengths in ``slots`` are brought up to date.
        """
        slots, decoding = self.slots, plan.decoding
        parts_tokens = [slots.token[:decoding]]
        parts_slots = [np.arange(decoding)]
        parts_positions = [slots.length[:decoding].copy()]
        logit_places, logit_slots = [np.arange(decoding)], [np.arange(decoding)]
        place = decoding
        for sequence, count in plan.chunks:
            first = sequence.cached
            parts_tokens.append(sequence.prompt[first : first + count])
            parts_slots.append(np.full(count, sequence.slot))
            parts_positions.append(np.arange(first, first + count))
            place += count
            if first + count == len(sequence.prompt):
                logit_places.append(np.array([place - 1]))
                logit_slots.append(np.array([sequence.slot]))
        tokens = np.concatenate(parts_tokens)
        positions = np.concatenate(parts_positions)
        self.cache.reserve(round_up(int(positions.max()) + 1))
        self.cache.begin_step(self._tensor(np.concatenate(parts_slots)), self._tensor(positions))
        layout = StepLayout(self.cache, self._spans(plan, positions))
        rows = np.concatenate(logit_places)
        output = self.model(
            input_ids=self._tensor(pad_rows(tokens))[None],
            position_ids=self._tensor(pad_rows(positions))[None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=self._tensor(pad_rows(rows)),
            step_layout=layout,
        )
        slots.length[:decoding] += 1
        for sequence, count in plan.chunks:
            sequence.cached += count
            slots.length[sequence.slot] = sequence.cached
        return output.logits[0, : len(rows)].float(), np.concatenate(logit_slots)

    def _spans(self, plan: StepPlan, positions: np.ndarray) -> list[Span]:
        spans = []
        if plan.decoding:
            decode = positions[: plan.decoding, None]
            index = np.arange(plan.decoding)[:, None]
            spans.append(Span(0, self._tensor(index), self._tensor(decode), round_up(int(decode.max()) + 1)))
        if plan.chunks:
            counts = np.array([count for _, count in plan.chunks])
            offsets = plan.decoding + np.concatenate([[0], np.cumsum(counts)[:-1]])
            # The score matrices' rows, too, come in multiples, so that the split into chunks changes no bit.
            step = np.arange(round_up(int(counts.max())))[None]
            valid = step < counts[:, None]
            index = np.where(valid, offsets[:, None] + step, 0)
            # Padding queries sit at position 0 and so look at one key: their result is finite and is dropped.
            where = np.where(valid, positions[index], 0)
            first_slot = plan.chunks[0][0].slot
            whole = None if valid.all() else self._tensor(valid)
            context = round_up(int(where.max()) + 1)
            spans.append(Span(first_slot, self._tensor(index), self._tensor(where), context, whole))
        return spans

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def pad_rows(array: np.ndarray) -> np.ndarray:
    """Pad with zeros to the next multiple of ``ROW_MULTIPLE``. array: [n] → [m]."""
    short = round_up(len(array)) - len(array)
    return np.concatenate([array, np.zeros(short, dtype=array.dtype)]) if short else array


def round_up(count: int) -> int:
    """The next multiple of ``ROW_MULTIPLE``."""
    return count + -count % ROW_MULTIPLE
