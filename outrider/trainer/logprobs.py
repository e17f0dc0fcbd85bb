"""Log-probabilities of given tokens, without the logits of all tokens in memory at once, forward or backward.

With logits z = cap(W h + b) / T of a token, log p(y) = z_y - logsumexp(z), so that d log p(y) / dz = onehot(y) -
softmax(z). The backward pass computes a chunk's logits again, and turns them into their gradient in place: memory is
that of one chunk's logits and of the gradient of W, whatever the number of tokens.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """The projection onto the vocabulary, and what becomes of its logits.

    weight: [vocabulary, hidden]. bias: [vocabulary] or None. softcap: c of c * tanh(logits / c), None without it.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, vocabulary] of hidden states [tokens, hidden], at temperature 1."""
        raw = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return raw if self.softcap is None else torch.tanh(raw / self.softcap) * self.softcap


def token_logprobs(
    hidden: Tensor, targets: Tensor, head: Head, temperature: float, chunk: int, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probability (nats) of each target under softmax(logits / temperature), float32 [tokens]; and, when asked for,
    the entropy (nats) of that distribution, float32 [tokens], through which no gradient flows.

    hidden [tokens, hidden], targets int64 [tokens]. chunk: tokens whose logits exist at the same time.
    """
    if torch.is_autocast_enabled(hidden.device.type):  # which the backward pass would know nothing of
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    logprobs, entropies = _Chunked.apply(
        hidden, head.weight, head.bias, targets, (head.softcap, temperature, chunk, entropy)
    )
    return logprobs, entropies if entropy else None


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        settings: tuple[float | None, float, int, bool],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        softcap, temperature, chunk, entropy = settings
        statistics = _on(hidden, _statistics)
        found = []
        logits = None
        for part, chosen in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = _project(part, weight, bias)
            found.append(statistics(logits, chosen, softcap, temperature, entropy))
        logprobs, normalizers, entropies = (torch.cat(parts) for parts in zip(*found, strict=True))
        # Of a single chunk the logits are kept: nothing is gained by computing them again.
        kept = logits if len(found) == 1 else None
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers, kept)
        ctx.settings = settings
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizers, kept = ctx.saved_tensors
        softcap, temperature, chunk, _ = ctx.settings
        to_gradient = _on(hidden, _to_gradient)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Added up in float32: there are many chunks.
        of_weight = torch.zeros_like(weight, dtype=_sum_dtype(hidden)) if wants_weight else None
        of_bias = torch.zeros_like(bias, dtype=_sum_dtype(hidden)) if wants_bias else None
        for start in range(0, len(hidden), chunk):
            span = slice(start, start + chunk)
            part = hidden[span]
            logits = kept.clone() if kept is not None else _project(part, weight, bias)
            to_gradient(logits, targets[span], normalizers[span], gradient[span], softcap, temperature)
            if of_hidden is not None:
                torch.mm(logits, weight.to(logits.dtype), out=of_hidden[span])
            if of_weight is not None:
                _add_product(of_weight, logits.t(), part)
            if of_bias is not None:
                of_bias += logits.sum(0, dtype=of_bias.dtype)
        return (
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None or bias is None else of_bias.to(bias.dtype),
            None,
            None,
        )


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits before the cap, in the precision of ``hidden``."""
    return torch.nn.functional.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a matrix product to a float32 sum, without rounding it to less before."""
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    elif right.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _scaled(logits: Tensor, softcap: float | None, temperature: float) -> Tensor:
    scaled = logits.to(_sum_dtype(logits))
    if softcap is not None:
        scaled = torch.tanh(scaled / softcap) * softcap
    return scaled / temperature if temperature != 1.0 else scaled


def _statistics(
    logits: Tensor, targets: Tensor, softcap: float | None, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, logarithms of the normalizers, and entropies (zeros unless asked for); float32 [tokens]."""
    scaled = _scaled(logits, softcap, temperature)
    normalizers = torch.logsumexp(scaled, dim=-1)
    chosen = scaled.gather(1, targets[:, None]).squeeze(1)
    entropies = torch.zeros_like(normalizers)
    if entropy:
        entropies = normalizers - ((scaled - normalizers[:, None]).exp() * scaled).sum(-1)
    return chosen - normalizers, normalizers, entropies


def _to_gradient(
    logits: Tensor, targets: Tensor, normalizers: Tensor, gradient: Tensor, softcap: float | None, temperature: float
) -> None:
    """Overwrite logits by the gradient with respect to them, given that of the log-probabilities [tokens]."""
    scaled = _scaled(logits, softcap, temperature)
    places = torch.arange(logits.shape[1], device=logits.device)
    found = (places == targets[:, None]).to(scaled.dtype) - (scaled - normalizers[:, None]).exp()
    found = found * (gradient / temperature)[:, None]
    if softcap is not None:
        found = found * (1 - (scaled * (temperature / softcap)) ** 2)
    logits.copy_(found)


def _on(tensor: Tensor, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, fused into one pass over the logits where there is a compiler for that."""
    return _fused(function) if tensor.is_cuda else function


@functools.cache
def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
