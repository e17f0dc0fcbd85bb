"""Rollouts of one prompt in one row: the prompt is computed once, and no completion sees another one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

#: ``part`` of a place that holds no token, and of the tokens of a prompt.
PADDING, PROMPT = -1, 0

#: Tokens of a row at which attention costs as much as the linear layers, in hidden sizes. By operations it is about 6;
#: attention under a mask runs at about a quarter of the speed of a matrix product.
_BREAK_EVEN = 1.5
#: Largest difference of hidden states, relative to their size, that is rounding: in float32 it is about 1e-6.
_ROUNDING = 1e-4

#: Hidden states [rows, width, hidden] of input_ids, attention_mask and position_ids (None where they just count).
Hidden = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Sharing:
    """How far a model lets rollouts of one prompt share its row.

    break_even: tokens of a row at which its attention costs as much as its linear layers. window: tokens of the
    longest rollout that no layer's sliding window cuts, None without one.
    """

    break_even: float
    window: int | None


def shared_mask(part: Tensor, attention: str) -> Tensor:
    """Every token sees the prompt and its own completion, as far as they lie before it.

    part: int64 [rows, width]: PROMPT, the number of a completion in its row counted from 1, or PADDING. attention:
    ``sdpa`` or ``eager``. Returns [rows, 1, width, width]: bool, or what eager attention adds to its scores.
    """
    query, key = part[:, :, None], part[:, None, :]
    place = torch.arange(part.shape[1], device=part.device)
    # Padding sees the prompt: an attention that sees nothing is nan.
    seen = (key == PROMPT) | ((key == query) & (key != PADDING))
    seen = (seen & (place <= place[:, None]))[:, None]
    if attention == "sdpa":
        return seen
    return torch.zeros(seen.shape, device=part.device).masked_fill(~seen, torch.finfo(torch.float32).min)


@torch.no_grad()
def find_sharing(config: PretrainedConfig, attention: str, hidden: Hidden, device: torch.device) -> Sharing | None:
    """How far the model behind ``hidden`` allows it, and None where it gives other hidden states for a shared row than
    for a row each, as models do that mix tokens by other means than attention. hidden: in float32."""
    if attention not in ("sdpa", "eager"):
        return None
    text = config.get_text_config()
    ids = torch.arange(1, 9, device=device) % text.vocab_size
    prompt, completions = ids[:3], (ids[3:5], ids[5:8])
    row = torch.cat([ids, ids.new_zeros(1)])[None]
    part = torch.tensor([[PROMPT] * 3 + [1] * 2 + [2] * 3 + [PADDING]], device=device)
    positions = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5, 0]], device=device)
    found = hidden(row, shared_mask(part, attention), positions)[0, 3:8]
    rows = [torch.cat([prompt, completion])[None] for completion in completions]
    expected = torch.cat([hidden(ids, torch.ones_like(ids), None)[0, 3:] for ids in rows])
    # Written so that nan is a difference, too.
    if not (found - expected).abs().max() <= _ROUNDING * expected.abs().max():
        return None
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return Sharing(_BREAK_EVEN * text.hidden_size, min((size for size in windows if size), default=None))
