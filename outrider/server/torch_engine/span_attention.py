"""Attention by torch's operations, over rectangles of slots and positions: for CUDA, for bfloat16, and where there are
no compiled kernels. Shorter sequences are padded to their neighbours' length, and masks hide what is not theirs."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from outrider.server.torch_engine.cache import SlotCache

#: Elements of a score matrix computed at once; bounds the memory of long prefills.
_MAX_SCORES = 16 * 1024 * 1024

#: Positions whose values are summed up by one matrix product. Longer sums are split by the CPU's kernels in ways that
#: depend on their length, and a sequence's bits would depend on how long its neighbours are.
VALUES_AT_ONCE = 256

#: Queries that are multiplied with the same keys at least. A CPU's kernels take one for a vector, and with AVX2 (on an
#: AMD EPYC) two or three as well.
LEAST_QUERIES = {"cpu": 4, "cuda": 2}


@dataclass
class Decoding:
    """One query for each of ``rows`` slots from ``first_slot`` on, at the places ``first_slot`` and on of the step's
    row. positions: int64 [rows], each query's position in its sequence. context: positions to attend over."""

    first_slot: int
    rows: int
    positions: Tensor
    context: int
    heads: int
    dtype: torch.dtype
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """What is added to scores: 0 or -inf, [rows x key-value heads, 1, context]; the same for every layer."""
        if window not in self._masks:
            hidden = hidden_keys(self.positions, self.context, window)
            mask = torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            self._masks[window] = mask.repeat_interleave(self.heads, dim=0)[:, None]
        return self._masks[window]

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, output: Tensor, window: int | None, softcap: float | None,
        scale: float,
    ) -> None:  # fmt: skip
        """queries, output [tokens, key-value heads, groups, size]; keys, values of one layer of the cache."""
        slots = slice(self.first_slot, self.first_slot + self.rows)
        mixed = output[slots].view(-1, *output.shape[2:])
        _mix(
            queries[slots].flatten(0, 1),
            keys[slots, ..., : self.context].flatten(0, 1),
            values[slots, :, : self.context].flatten(0, 1),
            self.mask(window),
            softcap,
            scale,
            mixed,
        )


@dataclass
class Prefilling:
    """A rectangle of queries: ``rows`` slots from ``first_slot`` on, each with up to ``width`` new tokens.

    index: int64 [rows, width], each query's place in the step's row of tokens (padding points at place 0).
    positions: int64 [rows, width], each query's position in its sequence. context: positions to attend over.
    valid: bool [rows, width], False for padding; None when there is none.
    """

    first_slot: int
    index: Tensor
    positions: Tensor
    context: int
    valid: Tensor | None = None
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """True where a query may not look: bool [rows, 1, 1, width, context]; the same for every layer."""
        if window not in self._masks:
            self._masks[window] = hidden_keys(self.positions, self.context, window)[:, None, None]
        return self._masks[window]

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, output: Tensor, window: int | None, softcap: float | None,
        scale: float,
    ) -> None:  # fmt: skip
        """As :meth:`Decoding.attend`."""
        rows, width = self.index.shape
        _, heads, groups, size = queries.shape
        slots = slice(self.first_slot, self.first_slot + rows)
        context_keys = keys[slots, ..., : self.context].flatten(0, 1)
        context_values = values[slots, :, : self.context].flatten(0, 1)
        chunk = max(1, _MAX_SCORES // (rows * heads * groups * self.context))
        for start in range(0, width, chunk):
            part = self.index[:, start : start + chunk]
            count = part.shape[1]
            # [rows, count, kv, groups, size] -> [rows x kv, groups x count, size]
            mine = queries[part].permute(0, 2, 3, 1, 4).reshape(rows * heads, groups * count, size)
            hidden = self.mask(window)[:, :, :, start : start + count].expand(-1, heads, groups, -1, -1)
            mask = torch.zeros(hidden.shape, dtype=mine.dtype, device=mine.device)
            mask.masked_fill_(hidden, float("-inf"))
            mixed = torch.empty_like(mine)
            _mix(mine, context_keys, context_values, mask.view(*mine.shape[:2], -1), softcap, scale, mixed)
            mixed = mixed.view(rows, heads, groups, count, size).permute(0, 3, 1, 2, 4)
            if self.valid is None:
                output[part] = mixed
            else:
                valid = self.valid[:, start : start + count]
                output[part[valid]] = mixed[valid]


def _mix(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, softcap: float | None, scale: float, out: Tensor
) -> None:
    """Attention of a batch of queries [batch, queries, size] over keys [batch, size, context] and values [batch,
    context, size], with ``mask`` added to the scores; into ``out`` [batch, queries, size].

    Decoding and prefilling compute by the same operations, so that a token's keys and values do not depend on which
    of the two has made them. For that there must be some queries at least: few are multiplied in another way.
    """
    count, least = queries.shape[1], LEAST_QUERIES[queries.device.type]
    if count < least:
        repeated = queries.repeat(1, -(-least // count), 1)
        several = torch.empty_like(repeated)
        if mask.shape[1] > 1:
            mask = mask.repeat(1, -(-least // count), 1)
        _mix(repeated, keys, values, mask, softcap, scale, several)
        out.copy_(several[:, :count])
        return
    if softcap is None:
        scores = torch.baddbmm(mask, queries, keys, alpha=scale)
    else:
        scores = torch.bmm(queries, keys).mul_(scale / softcap).tanh_().mul_(softcap).add_(mask)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    torch.bmm(weights[..., :VALUES_AT_ONCE], values[:, :VALUES_AT_ONCE], out=out)
    for start in range(VALUES_AT_ONCE, values.shape[1], VALUES_AT_ONCE):
        part = slice(start, start + VALUES_AT_ONCE)
        out.baddbmm_(weights[..., part], values[:, part])


def hidden_keys(positions: Tensor, context: int, window: int | None) -> Tensor:
    """Which keys a query may not see: those after it, and those before its window. [..., context] of ``positions``."""
    keys = torch.arange(context, device=positions.device)
    hidden = keys > positions[..., None]
    if window is not None:
        hidden |= keys <= positions[..., None] - window
    return hidden


@dataclass
class SpanLayout:
    """See :class:`attention.StepLayout`. slots, positions: where the step's keys and values go, int64 [tokens] each."""

    cache: SlotCache
    slots: Tensor
    positions: Tensor
    spans: list[Decoding | Prefilling]

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, window: int | None, softcap: float | None,
        scale: float, output: Tensor,
    ) -> None:  # fmt: skip
        """Put keys and values into the cache, and attend."""
        self.cache.write(layer, self.slots, self.positions, keys, values)
        cached_keys, cached_values = self.cache.layer_keys[layer], self.cache.layer_values[layer]
        for span in self.spans:
            span.attend(queries, cached_keys, cached_values, output, window, softcap, scale)
