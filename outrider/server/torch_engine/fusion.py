"""RMSNorm and rotary embedding in one pass each: the Hugging Face modules take eight and seven operations.

Each is only put in where it was seen to compute what is there.
"""

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from outrider.server.torch_engine import kernels

#: Whether a norm multiplies by its weight, or by one plus its weight as Gemma does.
_OFFSETS = (0.0, 1.0)
#: What modeling modules of Transformers call their rotary embedding.
_ROTARY = "apply_rotary_pos_emb"

_Rotary = Callable[..., tuple[Tensor, Tensor]]


def fuse(model: nn.Module) -> None:
    """Let a model (CPU, float32) in inference mode use the compiled kernels."""
    fuse_norms(model)
    for name in {type(module).__module__ for module in model.modules()}:
        own = getattr(sys.modules[name], _ROTARY, None)
        if own is not None and not isinstance(own, FusedRotary) and _rotates_alike(own):
            setattr(sys.modules[name], _ROTARY, FusedRotary(own))


def fuse_norms(model: nn.Module) -> int:
    """Returns how many RMSNorm modules of ``model`` have got the compiled forward pass."""
    replaced = 0
    for module in model.modules():
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not type(module).__name__.endswith("RMSNorm") or not isinstance(epsilon, float):
            continue
        for offset in _OFFSETS:
            forward = functools.partial(_norm, module, epsilon, offset)
            if _norms_alike(module, forward):
                module.forward = forward
                replaced += 1
                break
    return replaced


def _norm(module: nn.Module, epsilon: float, offset: float, hidden_states: Tensor) -> Tensor:
    return kernels.rms_norm(hidden_states.contiguous(), module.weight, epsilon, offset)  # type: ignore[arg-type]


@torch.inference_mode()
def _norms_alike(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> bool:
    if not isinstance(module.weight, Tensor):
        return False
    sample = torch.linspace(-3.0, 2.0, 3 * len(module.weight)).view(3, -1)
    return torch.allclose(module(sample), forward(sample), rtol=1e-5, atol=1e-6)


class FusedRotary:
    """Stands where a modeling module has its rotary embedding. In inference mode it is fused; a model that is being
    trained in the same process keeps ``own``."""

    def __init__(self, own: _Rotary) -> None:
        self.own = own

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *arguments: object, **keywords: object
    ) -> tuple[Tensor, Tensor]:
        """q, k [1, heads, tokens, size]; cos, sin [1, tokens, size]."""
        plain = torch.is_inference_mode_enabled() and not arguments and not keywords
        fits = (q.shape[0], *q.shape[2:]) == cos.shape and cos.dtype == q.dtype
        if not (plain and fits and kernels.usable(q.device, q.dtype)):
            return self.own(q, k, cos, sin, *arguments, **keywords)
        cosines, sines = cos[0].contiguous(), sin[0].contiguous()
        return tuple(  # type: ignore[return-value]
            kernels.rotate(x[0].transpose(0, 1).contiguous(), cosines, sines).transpose(0, 1)[None] for x in (q, k)
        )


@torch.inference_mode()
def _rotates_alike(own: _Rotary) -> bool:
    q, k = torch.linspace(-3.0, 2.0, 96).view(1, 2, 3, 16), torch.linspace(-1.0, 1.0, 48).view(1, 1, 3, 16)
    angles = torch.linspace(0.0, 3.0, 24).view(1, 3, 8).repeat(1, 1, 2)
    arguments = (q, k, angles.cos(), angles.sin())
    try:
        expected = own(*arguments)
    except (TypeError, ValueError, IndexError, RuntimeError):  # it takes something else
        return False
    found = FusedRotary(own)(*arguments)
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(expected, found, strict=True))
