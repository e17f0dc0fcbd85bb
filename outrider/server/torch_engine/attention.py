"""Attention of an engine step over the slot cache, registered through Transformers' attention interface.

The tokens of a step lie in one row without padding between sequences: first one token of each decoding slot,
then the prompt chunks being prefilled.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from outrider.server.torch_engine.cache import SlotCache

ATTENTION_NAME = "outrider_slots"


class StepLayout(Protocol):
    """Which queries a step holds, and how they attend."""

    cache: SlotCache

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, window: int | None, softcap: float | None,
        scale: float, output: Tensor,
    ) -> None:  # fmt: skip
        """Put new keys and values, ``[tokens, key-value heads, size]``, into the cache of ``layer``, and attend. All
        tensors are contiguous.

        Grouped query heads are folded, so that keys and values are read once and never repeated: queries and output
        ``[tokens, key-value heads, groups, size]``. The last tokens may be padding, whose output stays as it is.
        """


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
    """Attention of one layer. query ``[1, heads, tokens, size]``, key and value ``[1, key-value heads, tokens, size]``;
    returns ``[1, tokens, heads, size]``."""
    assert step_layout is not None, "the model did not pass step_layout on to its attention function"
    _, heads, tokens, size = query.shape
    kv_heads = step_layout.cache.heads
    queries = query[0].transpose(0, 1).contiguous().view(tokens, kv_heads, heads // kv_heads, size)
    # Zeros: what rows of padding hold must stay finite.
    output = torch.zeros_like(queries)
    step_layout.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        queries,
        key[0].transpose(0, 1).contiguous(),
        value[0].transpose(0, 1).contiguous(),
        sliding_window,
        softcap,
        size**-0.5 if scaling is None else scaling,
        output,
    )
    return output.view(1, tokens, heads, size), None


AttentionInterface.register(ATTENTION_NAME, slot_attention)
