"""Runs the Hugging Face model over one step's tokens."""

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from outrider.server.torch_engine import kernels
from outrider.server.torch_engine.attention import StepLayout
from outrider.server.torch_engine.cache import SlotCache
from outrider.server.torch_engine.fusion import fuse
from outrider.server.torch_engine.graphs import DecodingGraphs
from outrider.server.torch_engine.scheduler import StepPlan
from outrider.server.torch_engine.sequence import Sequence
from outrider.server.torch_engine.slots import Slots
from outrider.server.torch_engine.span_attention import Decoding, Prefilling, SpanLayout
from outrider.server.torch_engine.token_attention import TokenAttention

#: Both sides of every matrix product that vary from step to step are padded to a multiple of this. Only then do the
#: CPU's matrix kernels give a row the same bits whatever stands beside it, and a sequence's tokens do not depend on
#: its neighbours.
ROW_MULTIPLE = 16
#: Positions that are attended over at least, for the same reason: very small products go another way.
LEAST_CONTEXT = 64
#: Slots that attend together, each over as many positions as the longest of them has.
DECODING_BLOCK = 64


class ModelRunner:
    """One forward pass for the decoding slots and the prompt chunks of a step."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache, slots: Slots) -> None:
        self.model, self.cache, self.slots = model, cache, slots
        self.device = model.device
        self.graphs = DecodingGraphs(model, cache) if self.device.type == "cuda" else None
        self._attention = TokenAttention(cache) if cache.blocked else None
        if kernels.usable(self.device, cache.dtype):
            fuse(model)

    def forward(self, plan: StepPlan) -> tuple[Tensor, np.ndarray]:
        """Compute a step and put its keys and values into the cache.

        Returns logits float32 [rows, vocabulary] and the slots they belong to, int64 [rows]: every decoding slot
        and every prefilling one whose prompt ends in this step. Lengths in ``slots`` are brought up to date.
        """
        slots, decoding = self.slots, plan.decoding
        if self.graphs is not None and not plan.chunks:
            logits = self.graphs.run(slots.token[:decoding], slots.length[:decoding])
            slots.length[:decoding] += 1
            return logits.float(), np.arange(decoding)
        parts_tokens = [slots.token[:decoding]]
        parts_slots = [np.arange(decoding)]
        parts_positions = [slots.length[:decoding].copy()]
        logit_places, logit_slots = [np.arange(decoding)], [np.arange(decoding)]
        place = decoding
        for sequence, count in plan.chunks:
            first = sequence.cached
            parts_tokens.append(sequence.tokens[first : first + count])
            parts_slots.append(np.full(count, sequence.slot))
            parts_positions.append(np.arange(first, first + count))
            place += count
            if first + count == len(sequence.tokens):
                logit_places.append(np.array([place - 1]))
                logit_slots.append(np.array([sequence.slot]))
        tokens = np.concatenate(parts_tokens)
        positions = np.concatenate(parts_positions)
        layout = self._layout(plan, np.concatenate(parts_slots), positions)
        rows = np.concatenate(logit_places)
        output = self.model(
            input_ids=self._tensor(pad_rows(tokens))[None],
            position_ids=self._tensor(pad_rows(positions))[None],
            past_key_values=self.cache,
            use_cache=True,
            # 0 is all of them.
            logits_to_keep=self._tensor(pad_rows(rows)) if plan.chunks else 0,
            step_layout=layout,
        )
        slots.length[:decoding] += 1
        for sequence, count in plan.chunks:
            sequence.cached += count
            slots.length[sequence.slot] = sequence.cached
        return output.logits[0, : len(rows)].float(), np.concatenate(logit_slots)

    def _layout(self, plan: StepPlan, slots: np.ndarray, positions: np.ndarray) -> StepLayout:
        """slots, positions: where the step's tokens go, int64 [tokens] each."""
        if self._attention is not None:
            return self._attention.layout(self._tensor(slots), self._tensor(positions))
        spans: list[Decoding | Prefilling] = [
            *self._decoding(positions[: plan.decoding]),
            *self._prefilling(plan, positions),
        ]
        return SpanLayout(self.cache, self._tensor(slots), self._tensor(positions), spans)

    def _decoding(self, positions: np.ndarray) -> list[Decoding]:
        spans = []
        for first in range(0, len(positions), DECODING_BLOCK):
            block = positions[first : first + DECODING_BLOCK]
            context = context_size(block)
            spans.append(Decoding(first, len(block), self._tensor(block), context, self.cache.heads, self.cache.dtype))
        return spans

    def _prefilling(self, plan: StepPlan, positions: np.ndarray) -> list[Prefilling]:
        """One rectangle for each run of neighbours with about the same number of tokens."""
        spans, place, run = [], plan.decoding, list[tuple[Sequence, int]]()
        for chunk in plan.chunks:
            if run and width_class(chunk[1]) != width_class(run[0][1]):
                spans.append(self._rectangle(run, place, positions))
                place += sum(count for _, count in run)
                run = []
            run.append(chunk)
        if run:
            spans.append(self._rectangle(run, place, positions))
        return spans

    def _rectangle(self, run: list[tuple[Sequence, int]], place: int, positions: np.ndarray) -> Prefilling:
        counts = np.array([count for _, count in run])
        offsets = place + np.concatenate([[0], np.cumsum(counts)[:-1]])
        # The score matrices' rows, too, come in multiples, so that the split into chunks changes no bit.
        step = np.arange(round_up(int(counts.max())))[None]
        valid = step < counts[:, None]
        index = np.where(valid, offsets[:, None] + step, 0)
        # Padding queries sit at position 0 and so look at one key: their result is finite and is dropped.
        where = np.where(valid, positions[index], 0)
        whole = None if valid.all() else self._tensor(valid)
        context = context_size(where)
        return Prefilling(run[0][0].slot, self._tensor(index), self._tensor(where), context, whole)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def pad_rows(array: np.ndarray) -> np.ndarray:
    """Pad with zeros to the next multiple of ``ROW_MULTIPLE``. array: [n] → [m]."""
    short = round_up(len(array)) - len(array)
    return np.concatenate([array, np.zeros(short, dtype=array.dtype)]) if short else array


def round_up(count: int) -> int:
    """The next multiple of ``ROW_MULTIPLE``."""
    return count + -count % ROW_MULTIPLE


def context_size(positions: np.ndarray) -> int:
    """Positions to attend over for queries at ``positions``."""
    return max(LEAST_CONTEXT, round_up(int(positions.max()) + 1))


def width_class(count: int) -> int:
    """Chunks of one class share a rectangle: less than half of it is padding."""
    return round_up(count).bit_length()
