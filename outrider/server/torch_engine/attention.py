"""Attention of an engine step over the slot cache, registered through Transformers' attention interface.

The tokens of a step lie in one row without padding between sequences: first one token of each decoding slot,
then the prompt chunks being prefilled. Grouped query heads are folded into the query dimension, so that keys and
values are read once and never repeated.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from outrider.server.torch_engine.cache import SlotCache

ATTENTION_NAME = "outrider_slots"

#: Elements of a score matrix computed at once; bounds the memory of long prefills.
_MAX_SCORES = 16 * 1024 * 1024


@dataclass
class Span:
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
            keys = torch.arange(self.context, device=self.positions.device)
            hidden = keys > self.positions[..., None]
            if window is not None:
                hidden |= keys <= self.positions[..., None] - window
            self._masks[window] = hidden[:, None, None]
        return self._masks[window]


@dataclass
class StepLayout:
    """Which queries a step holds: the decoding rectangle and the prefilling one."""

    cache: SlotCache
    spans: list[Span]


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    step_layout: StepLayout | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of one layer. query ``[1, heads, tokens, head size]``; returns ``[1, tokens, heads, head size]``.

    ``key`` and ``value`` are already in the cache (see :meth:`SlotCache.update`) and are not read.
    """
    assert step_layout is not None, "the model did not pass step_layout on to its attention function"
    cache, layer = step_layout.cache, int(module.layer_idx)  # type: ignore[arg-type]
    _, heads, tokens, head_size = query.shape
    groups = heads // cache.heads
    scale = head_size**-0.5 if scaling is None else scaling
    folded = query[0].transpose(0, 1).reshape(tokens, cache.heads, groups, head_size) * scale
    output = torch.zeros_like(folded)
    for span in step_layout.spans:
        rows, width = span.index.shape
        slots = slice(span.first_slot, span.first_slot + rows)
        keys = cache.keys[layer][slots, :, : span.context]
        values = cache.values[layer][slots, :, : span.context]
        mask = span.mask(sliding_window)
        chunk = max(1, _MAX_SCORES // (rows * heads * span.context))
        for start in range(0, width, chunk):
            part = span.index[:, start : start + chunk]
            count = part.shape[1]
            # [rows, count, kv, groups, size] -> [rows, kv, groups x count, size]
            queries = folded[part].permute(0, 2, 3, 1, 4).reshape(rows, cache.heads, groups * count, head_size)
            hidden = mask[:, :, :, start : start + count]
            if softcap is None and folded.dtype != torch.float32:
                mixed = _fused(queries, keys, values, hidden, groups)
            else:
                mixed = _explicit(queries, keys, values, hidden, groups, softcap)
            mixed = mixed.view(rows, cache.heads, groups, count, head_size).permute(0, 3, 1, 2, 4)
            if span.valid is None:
                output[part] = mixed
            else:
                valid = span.valid[:, start : start + count]
                output[part[valid]] = mixed[valid]
    return output.view(1, tokens, heads, head_size), None


def _fused(queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, groups: int) -> Tensor:
    """Attention by the fused kernel, which reads 16-bit keys and values where they lie; on the CPU 1.5 to 5 times as
    fast as the explicit one, which has to copy them (and slower for float32, where that one copies nothing).

    queries [rows, kv, groups x count, size]; keys, values [rows, kv, context, size]; hidden bool
    [rows, 1, 1, count, context].
    """
    seen = ~hidden.expand(-1, 1, groups, -1, -1).flatten(2, 3)
    return nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=1.0)


def _explicit(
    queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, groups: int, softcap: float | None
) -> Tensor:
    """Attention by two matrix products, with soft-capped scores where the model has them. Shapes as for ``_fused``."""
    rows, heads, width, _ = queries.shape
    scores = torch.matmul(queries, keys.transpose(-1, -2)).float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    by_group = scores.view(rows, heads, groups, width // groups, keys.shape[2])
    by_group.masked_fill_(hidden, float("-inf"))
    return torch.matmul(torch.softmax(scores, dim=-1).to(values.dtype), values)


AttentionInterface.register(ATTENTION_NAME, slot_attention)
