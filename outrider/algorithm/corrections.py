"""Correction for rollouts sampled by another policy than the one the loss takes as old.

The sampler's log-probabilities differ from the trainer's even for the same weights (kernels, precision), and
more so when the weights have moved on since. The importance weight ρ = π_old / π_rollout repairs the
expectation; truncating or masking it bounds the variance.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from outrider.algorithm.losses import sequence_mean

CorrectionMode = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@torch.no_grad()
def rollout_correction(
    *,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    sequence: Tensor,
    num_sequences: int,
    mode: CorrectionMode,
    threshold: float,
) -> Tensor:
    """The weight of each token's policy term, from ρ_t = exp(old_t − rollout_t) and the threshold C.

        none                1
        token_truncate      min(ρ_t, C)             truncated importance sampling (Yao et al. 2025)
        token_mask          ρ_t · 1[ρ_t ≤ C]
        sequence_truncate   min(ρ̄, C)               ρ̄ = exp(mean over the sequence of old − rollout), the
        sequence_mask       ρ̄ · 1[ρ̄ ≤ C]            geometric mean of its ρ_t, as in GSPO (2507.18071)

    With old the policy at the start of the step and rollout the one that sampled, this is the factor
    π_prox / π_behaviour of AReaL's decoupled objective (2505.24298), bounded. The geometric mean keeps long
    sequences comparable with short ones, where the product of the ρ_t would vanish or explode.

    Shapes: old_logprobs, rollout_logprobs [tokens], in nats; sequence int64[tokens], each below
    num_sequences. Returns [tokens], detached. ValueError for a threshold that is not a positive number, for
    shapes that differ and for an unknown mode.
    """
    _check_pair(old_logprobs, rollout_logprobs)
    if mode == "none":
        return torch.ones_like(old_logprobs)
    if not (math.isfinite(threshold) and threshold > 0.0):
        raise ValueError(f"the correction threshold is {threshold}: it must be positive, such as 2.0")
    log_rho = old_logprobs - rollout_logprobs
    if mode in ("sequence_truncate", "sequence_mask"):
        lengths = log_rho.new_zeros(num_sequences).index_add(0, sequence, torch.ones_like(log_rho))
        log_rho = sequence_mean(log_rho, sequence, lengths)[sequence]
    rho = log_rho.exp()
    if mode in ("token_truncate", "sequence_truncate"):
        return rho.clamp(max=threshold)
    if mode in ("token_mask", "sequence_mask"):
        return rho.where(rho <= threshold, 0.0)
    raise ValueError(
        f"the correction mode is {mode!r}: choose none, token_truncate, token_mask, sequence_truncate or sequence_mask"
    )


class GapStats(NamedTuple):
    """How far the sampler's log-probabilities are from the trainer's, in nats, over one micro-batch.

    Sums, for the caller to add up and divide by tokens; abs_max is to be maximized. k1_sum / tokens
    estimates KL(rollout ‖ old) without bias, because the tokens were sampled from rollout.
    """

    abs_sum: Tensor
    abs_max: Tensor
    k1_sum: Tensor
    tokens: int


@torch.no_grad()
def logprob_gap(old_logprobs: Tensor, rollout_logprobs: Tensor) -> GapStats:
    """The live gauge of sampler against trainer: Σ|old − rollout|, its maximum, and Σ(rollout − old).

    Both are [tokens], in nats; all results are detached scalars, 0 without tokens. ValueError if the shapes
    differ.
    """
    _check_pair(old_logprobs, rollout_logprobs)
    gap = rollout_logprobs - old_logprobs
    # The zero in front gives an empty micro-batch a maximum, and changes no other.
    largest = torch.cat([gap.new_zeros(1), gap.abs()]).max()
    return GapStats(abs_sum=gap.abs().sum(), abs_max=largest, k1_sum=gap.sum(), tokens=gap.numel())


def _check_pair(old_logprobs: Tensor, rollout_logprobs: Tensor) -> None:
    if old_logprobs.ndim != 1 or old_logprobs.shape != rollout_logprobs.shape:
        raise ValueError(
            f"old_logprobs have shape {tuple(old_logprobs.shape)}, rollout_logprobs "
            f"{tuple(rollout_logprobs.shape)}: both must be [tokens]"
        )
