"""Attention over sequences of any lengths that lie one after the other, without padding between them.

On CUDA by PyTorch's own variable-length attention; elsewhere sequence by sequence. Transformers' models call it when
their attention implementation is :data:`VARLEN`, and hand through the arguments that :func:`bounds_of` makes.
"""

import inspect
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig

VARLEN = "outrider_varlen"
#: From PyTorch 2.13 on grouped heads have to be asked for.
_PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters)


def bounds_of(bounds: Tensor, longest: int) -> dict[str, Any]:
    """What a model's forward takes beside tokens and positions. bounds: int32 [sequences + 1], where sequences begin,
    and where the last one ends. longest: tokens of the longest one, or more."""
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence. query: [1, heads, tokens, width]; key, value: those of fewer heads.
    sliding_window: tokens that a token sees, itself among them. Returns [1, tokens, heads, width].

    Raises ValueError for what it cannot do; the policy then computes padded rows.
    """
    if cu_seq_lens_q is None or max_length_q is None or query.shape[0] != 1:
        raise ValueError("the bounds of the sequences did not get to the attention")
    if attention_mask is not None or softcap is not None or s_aux is not None:
        raise ValueError("masks, caps and sinks are not for this attention")
    if query.is_cuda:
        return _on_cuda(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    return _one_by_one(query, key, value, cu_seq_lens_q, scaling, sliding_window), None


def kernel_takes(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether attention on ``device`` takes heads like the model's: kernels know only some widths, and precisions."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    if device.type != "cuda":
        return True
    if getattr(text, "v_head_dim", width) != width:
        return False
    query = torch.zeros(1, heads, 8, width, dtype=dtype, device=device)
    some = query[:, : getattr(text, "num_key_value_heads", None) or heads]
    try:
        _on_cuda(query, some, some, torch.tensor([0, 8], dtype=torch.int32, device=device), 8, None, None)
    except RuntimeError:
        return False
    return True


def _on_cuda(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    settings: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0) if window is None else (window - 1, 0)}
    if "enable_gqa" in _PARAMETERS:
        settings["enable_gqa"] = bool(query.shape[1] != key.shape[1])
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    found: Any = varlen_attn(query, key, value, bounds, bounds, longest, longest, **settings)
    return found[None]


@torch.compiler.disable
def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    parts = []
    for start, end in itertools.pairwise(bounds.tolist()):
        span = slice(start, end)
        mask = None
        if window is not None and end - start > window:
            mask = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).tril()
            mask = mask.triu(1 - window)
        parts.append(
            scaled_dot_product_attention(
                query[:, :, span], key[:, :, span], value[:, :, span], attn_mask=mask, is_causal=mask is None,
                scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
            )
        )  # fmt: skip
    return torch.cat(parts, dim=2).transpose(1, 2)


AttentionInterface.register(VARLEN, varlen_attention)
