"""The clipped policy-gradient losses of the GRPO family.

Everything here is flat over completion tokens: a token knows its sequence, and nothing knows about rows,
padding or packing, so none of them can change a loss. One set of counts, taken over the whole optimizer step
(all ranks, all micro-batches), normalizes it: the micro-batch losses add up to the loss of the step.
"""

from typing import Literal, NamedTuple, get_args

import msgspec
import torch
from torch import Tensor

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
ImportanceSamplingLevel = Literal["token", "sequence"]
_CHOICES = {"loss_type": get_args(LossType), "importance_sampling_level": get_args(ImportanceSamplingLevel)}

# exp(±20) is far outside any clipping range, and finite. An infinite ratio times a correction of zero would
# be NaN, and one such token would end the run.
LOG_RATIO_LIMIT = 20.0


class LossSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Which loss, with which constants. ValueError where they contradict each other.

    loss_type: how the terms of the tokens are averaged, see `policy_loss`.
    epsilon, epsilon_high: the ratio is clipped to [1 − epsilon, 1 + epsilon_high]; None means epsilon on both
        sides. A larger epsilon_high is DAPO's clip-higher.
    delta: upper limit of the ratio in the unclipped term as well, which bounds what a token with A < 0 can do
        (two-sided clipping, INTELLECT-2). None is no limit.
    beta: weight of the KL term; 0 needs no reference model.
    importance_sampling_level: one ratio for each token (GRPO) or for each sequence (GSPO).
    max_completion_length: the constant of dr_grpo, in tokens.
    """

    loss_type: LossType = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    importance_sampling_level: ImportanceSamplingLevel = "token"
    max_completion_length: int

    def __post_init__(self) -> None:
        # A struct checks its types only when decoded; a misspelt level must not quietly mean another one.
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if self.epsilon < 0.0:
            raise ValueError(f"epsilon is {self.epsilon}: it must not be negative")
        if self.epsilon_high is not None and self.epsilon_high < 0.0:
            raise ValueError(f"epsilon_high is {self.epsilon_high}: it must not be negative")
        if self.delta is not None and self.delta <= self.clip_high:
            raise ValueError(
                f"delta is {self.delta}, inside the clipping range that ends at {self.clip_high}: "
                "set it above 1 + epsilon_high, or leave it out"
            )
        if self.beta < 0.0:
            raise ValueError(f"beta is {self.beta}: it must not be negative")
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length is {self.max_completion_length}: it must be at least 1")

    @property
    def clip_low(self) -> float:
        """Lower end of the clipping range of the ratio."""
        return 1.0 - self.epsilon

    @property
    def clip_high(self) -> float:
        """Upper end of the clipping range of the ratio."""
        return 1.0 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)


class StepCounts(msgspec.Struct, frozen=True):
    """What one whole optimizer step holds, over all ranks and micro-batches: sequences, completion tokens."""

    sequences: int
    tokens: int


class LossOutput(NamedTuple):
    """The loss of one micro-batch, and sums over its tokens for the caller to add up (ratio_max: maximize).

    loss: scalar with gradient; the losses of a step's micro-batches add up to the loss of the step.
    clip_low_sum, clip_high_sum: tokens whose gradient the clipping stopped, at the lower end (A < 0 and
        r < 1 − ε) and at the upper end (A > 0 and r > 1 + ε_high).
    kl_sum: Σ k3 against the reference, 0 without one. ratio_sum, ratio_max: of r, per token.
    All but loss are detached; divide the sums by tokens (summed likewise) for a mean.
    """

    loss: Tensor
    clip_low_sum: Tensor
    clip_high_sum: Tensor
    kl_sum: Tensor
    ratio_sum: Tensor
    ratio_max: Tensor
    tokens: int


def policy_loss(
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sequence: Tensor,
    spec: LossSpec,
    counts: StepCounts,
    correction: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
) -> LossOutput:
    """Clipped policy-gradient loss of one micro-batch: Σ_t w_t · (c_t · P_t + β · k3_t).

    With A the advantage of the token's sequence i, and ε_low = epsilon:

        r_t  = exp(logp_t − old_t)                        token    (PPO 1707.06347, GRPO 2402.03300)
             = exp(mean over sequence i of logp − old)    sequence (GSPO 2507.18071)
        P_t  = −min(min(r_t, δ) · A, clip(r_t, 1 − ε_low, 1 + ε_high) · A)
               (δ: INTELLECT-2 2505.07291; ε_high: DAPO 2503.14476)
        k3_t = exp(ref_t − logp_t) − (ref_t − logp_t) − 1          (Schulman 2020; GRPO)
        w_t  = 1 / (counts.sequences · length of i)                 grpo
             = 1 / counts.tokens                                    dapo, bnpo (BNPO 2506.02864)
             = 1 / (counts.sequences · max_completion_length)       dr_grpo (2503.20783)

    Elsewhere bnpo divides by the tokens of a micro-batch, which makes the loss depend on how sequences were
    packed. Here its batch is the optimizer step, and then it is the same loss as dapo.

    The correction c_t (see `corrections`; 1 if absent) weights the policy term alone: it accounts for having
    sampled from another policy than old, as in AReaL's decoupled objective (2505.24298). The KL term is a
    regularizer rather than part of that objective, and stays as it is; TRL does the same.

    Shapes: logprobs, old_logprobs, sequence, correction and ref_logprobs [tokens]; advantages [sequences of
    this micro-batch]; sequence is int64, the index into advantages of each token. A sequence must be whole
    within one micro-batch: grpo needs its length, and the sequence level its mean. Units: nats.
    Gradients flow through logprobs only; logprobs.detach() is a valid old_logprobs (on-policy, r = 1).

    A micro-batch without tokens gives a loss of exactly 0 that is still connected to logprobs, so that every
    rank can run the same backward. ValueError for shapes that do not fit, and for β > 0 without ref_logprobs.
    """
    _check_shapes(logprobs, old=old_logprobs, sequence=sequence, correction=correction, ref=ref_logprobs)
    if spec.beta > 0.0 and ref_logprobs is None:
        raise ValueError(f"beta is {spec.beta} but there are no ref_logprobs: load a reference model, or set beta to 0")
    lengths = advantages.new_zeros(advantages.shape, dtype=logprobs.dtype)
    lengths = lengths.index_add(0, sequence, torch.ones_like(logprobs))

    log_ratio = logprobs - old_logprobs.detach()
    if spec.importance_sampling_level == "sequence":
        log_ratio = sequence_mean(log_ratio, sequence, lengths)[sequence]
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    advantage = advantages.detach().to(logprobs.dtype)[sequence]

    unclipped = ratio if spec.delta is None else ratio.clamp(max=spec.delta)
    clipped = ratio.clamp(spec.clip_low, spec.clip_high)
    term = -torch.minimum(unclipped * advantage, clipped * advantage)
    if correction is not None:
        term = term * correction.detach()

    kl_sum = logprobs.new_zeros(())
    if ref_logprobs is not None:
        kl = _k3(logprobs if spec.beta > 0.0 else logprobs.detach(), ref_logprobs.detach())
        kl_sum = kl.detach().sum()
        if spec.beta > 0.0:
            term = term + spec.beta * kl

    return LossOutput(
        loss=(term * _token_weights(spec, counts, lengths, sequence)).sum(),
        clip_low_sum=((advantage < 0) & (ratio < spec.clip_low)).sum(),
        clip_high_sum=((advantage > 0) & (ratio > spec.clip_high)).sum(),
        kl_sum=kl_sum,
        ratio_sum=ratio.detach().sum(),
        # Ratios are positive, so a zero in front changes no maximum and gives an empty micro-batch one.
        ratio_max=torch.cat([ratio.new_zeros(1), ratio.detach()]).max(),
        tokens=logprobs.numel(),
    )


def sequence_mean(values: Tensor, sequence: Tensor, lengths: Tensor) -> Tensor:
    """Mean over each sequence: values [tokens], sequence int64[tokens], lengths [sequences] → [sequences].

    A sequence without tokens has mean 0.
    """
    return torch.zeros_like(lengths).index_add(0, sequence, values) / lengths.clamp(min=1.0)


def _token_weights(spec: LossSpec, counts: StepCounts, lengths: Tensor, sequence: Tensor) -> Tensor | float:
    """w_t of `policy_loss`: [tokens] for grpo, one number for the others."""
    # A step without tokens has only anchored zeros to divide; its counts must not turn them into NaN.
    sequences, tokens = max(counts.sequences, 1), max(counts.tokens, 1)
    match spec.loss_type:
        case "grpo":
            return 1.0 / (sequences * lengths[sequence])
        case "dapo" | "bnpo":
            return 1.0 / tokens
        case "dr_grpo":
            return 1.0 / (sequences * spec.max_completion_length)


def _k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimator of KL(policy ‖ reference), per token, in nats; never negative."""
    gap = (ref_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return gap.exp() - gap - 1.0


def _check_shapes(logprobs: Tensor, **others: Tensor | None) -> None:
    if logprobs.ndim != 1:
        raise ValueError(f"logprobs have shape {tuple(logprobs.shape)}: expected one dimension, [tokens]")
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != logprobs.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, logprobs {tuple(logprobs.shape)}: both are [tokens]"
            )
