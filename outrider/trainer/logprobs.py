"""Log-probabilities of given tokens, without the logits of all tokens in memory at once."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

#: From hidden states [tokens, hidden] to logits [tokens, vocabulary].
Project = Callable[[Tensor], Tensor]


def token_logprobs(hidden: Tensor, targets: Tensor, project: Project, temperature: float, chunk: int) -> Tensor:
    """Log-probability (nats) of each target under softmax(logits / temperature); float32 [tokens].

    hidden [tokens, hidden], targets int64 [tokens]. The vocabulary projection of ``chunk`` tokens at a time is made,
    and made again in the backward pass, so that memory does not grow with tokens x vocabulary.
    """
    if len(targets) <= chunk:
        return _chunk_logprobs(hidden, targets, project, temperature)
    parts = [
        checkpoint(_chunk_logprobs, h, t, project, temperature, use_reentrant=False)
        if torch.is_grad_enabled()
        else _chunk_logprobs(h, t, project, temperature)
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat(parts)


def _chunk_logprobs(hidden: Tensor, targets: Tensor, project: Project, temperature: float) -> Tensor:
    logits = project(hidden).float()
    if temperature != 1.0:
        logits = logits / temperature
    chosen = logits.gather(1, targets[:, None]).squeeze(1)
    return chosen - torch.logsumexp(logits, dim=-1)
