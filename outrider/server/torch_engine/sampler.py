"""From logits to tokens, for a whole batch at once."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from outrider.server.torch_engine.randomness import uniforms

#: Lower ones count as this one, which leaves only the most likely token just the same: dividing by less overflows.
MIN_TEMPERATURE = 1e-20


@dataclass
class SamplingRows:
    """Sampling parameters of the rows of a batch, one entry a row (NumPy arrays)."""

    temperature: np.ndarray  # float32
    top_p: np.ndarray  # float32
    top_k: np.ndarray  # int64; 0 is off
    min_p: np.ndarray  # float32; 0 is off
    seed: np.ndarray  # uint64
    counter: np.ndarray  # int64: index of the token to be drawn


def sample(logits: Tensor, rows: SamplingRows) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token from each row.

    logits: float32 [rows, vocabulary]. Returns tokens int64 [rows], their log-probabilities float32 [rows] (nats)
    under the distribution drawn from: after temperature, top-k, min-p and top-p, renormalized; and all those
    log-probabilities, float32 [rows, vocabulary]. A greedy row (temperature 0) takes the most likely token and reports
    its log-probability at temperature 1, since that of a point mass says nothing.
    """
    device = logits.device
    greedy = rows.temperature == 0.0
    scale = np.where(greedy, 1.0, np.maximum(rows.temperature, MIN_TEMPERATURE)).astype(np.float32)
    if (scale != 1.0).any():
        logits = logits / torch.from_numpy(scale).to(device)[:, None]
    if (rows.top_k > 0).any() or (rows.top_p < 1.0).any() or (rows.min_p > 0.0).any():
        logits = truncate(
            logits,
            torch.from_numpy(rows.top_k).to(device),
            torch.from_numpy(rows.min_p).to(device),
            torch.from_numpy(rows.top_p).to(device),
        )
    logprobs = torch.log_softmax(logits, dim=-1)
    if greedy.all():
        tokens = logits.argmax(dim=-1)
    else:
        cumulative = logprobs.exp().cumsum_(dim=-1)
        draw = torch.from_numpy(uniforms(rows.seed, rows.counter).astype(np.float32)).to(device)
        # The threshold stays below the last sum, and the search is strict: a token of probability 0 is never drawn.
        total = cumulative[:, -1]
        threshold = (draw * total).minimum(total * (1.0 - 2.0**-23))
        tokens = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(1)
        # Where the logits are not finite, nothing is found. The engine gives up such sequences.
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
        if greedy.any():
            tokens = torch.where(torch.from_numpy(greedy).to(device), logits.argmax(dim=-1), tokens)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1), logprobs


def truncate(logits: Tensor, top_k: Tensor, min_p: Tensor, top_p: Tensor) -> Tensor:
    """Set to -inf all but each row's ``top_k`` most likely tokens; of those all less likely than ``min_p`` times the
    most likely one (Nguyen et al. 2024, arXiv:2407.01082); and of those all beyond the smallest set whose probability
    reaches ``top_p`` (Holtzman et al. 2019, arXiv:1904.09751).

    logits [rows, vocabulary]; top_k int64 [rows], ≤ 0 off; min_p, top_p float [rows].
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    keep_k = torch.where(top_k > 0, top_k, logits.shape[-1])
    ordered = ordered.masked_fill(rank[None] >= keep_k[:, None], float("-inf"))
    # p < min_p x p_max, as logarithms: log(0) = -inf drops nothing.
    ordered = ordered.masked_fill(ordered < ordered[:, :1] + min_p.log()[:, None], float("-inf"))
    probabilities = torch.softmax(ordered, dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    dropped = (before >= top_p[:, None]) & (rank[None] > 0)
    ordered = ordered.masked_fill(dropped, float("-inf"))
    return torch.empty_like(logits).scatter_(1, order, ordered)
