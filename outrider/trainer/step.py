"""One optimizer step: log-probabilities, loss and gradients of a batch, micro-batch by micro-batch."""

import math
from dataclasses import dataclass

import torch

from outrider.algorithm.corrections import logprob_gap, rollout_correction
from outrider.algorithm.losses import LossSpec, StepCounts, policy_loss
from outrider.contract.feed import Batch
from outrider.trainer.config import BatchConfig, CorrectionMode
from outrider.trainer.model import Policy
from outrider.trainer.packing import collate, form_micro_batches


@dataclass
class StepOutcome:
    """What a step's forward and backward passes showed. Shares and means are over the trained tokens.

    logprob_gap: mean |trainer - sampler|. correction_mean: mean weight of the rollout correction, 1 without one.
    """

    loss: float = 0.0
    grad_norm: float = 0.0
    tokens: int = 0
    clip_low_share: float = 0.0
    clip_high_share: float = 0.0
    kl: float = 0.0
    logprob_gap: float = 0.0
    logprob_gap_max: float = 0.0
    correction_mean: float = 1.0


class StepComputer:
    """Computes gradients. The optimizer and whoever publishes weights are the caller's."""

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        loss: LossSpec,
        batch: BatchConfig,
        correction: CorrectionMode,
        threshold: float,
        max_grad_norm: float,
    ) -> None:
        """reference: for the KL term, None without one. threshold: of the rollout correction."""
        self.policy, self.reference, self.loss, self.batch = policy, reference, loss, batch
        self.correction, self.threshold, self.max_grad_norm = correction, threshold, max_grad_norm

    def gradients(self, batch: Batch) -> StepOutcome:
        """Leave the step's clipped gradient in the parameters. Every micro-batch is divided by the counts of the
        whole step, so that how rollouts are packed changes nothing but rounding."""
        samples, config = batch.samples, self.batch
        lengths = [(len(sample.prompt) + len(sample.completion)) // 4 for sample in samples]
        counts = StepCounts(batch.sequences, batch.tokens)
        outcome, clip_low, clip_high, kl, gap, corrected = StepOutcome(), 0.0, 0.0, 0.0, 0.0, 0.0
        for rows in form_micro_batches(lengths, config.per_device_train_batch_size, config.max_tokens_per_micro_batch):
            micro = collate([samples[row] for row in rows], self.policy.device)
            logprobs = self.policy.logprobs(micro)
            # One optimizer step a batch: the policy before the step is the policy now, and needs no second pass.
            old = logprobs.detach()
            weights = rollout_correction(
                old_logprobs=old,
                rollout_logprobs=micro.rollout_logprobs,
                sequence=micro.sequence,
                num_sequences=micro.rows,
                mode=self.correction,
                threshold=self.threshold,
            )
            reference = None
            if self.reference is not None:
                with torch.no_grad():
                    reference = self.reference.logprobs(micro)
            out = policy_loss(
                logprobs=logprobs,
                old_logprobs=old,
                advantages=micro.advantages,
                sequence=micro.sequence,
                spec=self.loss,
                counts=counts,
                correction=weights,
                ref_logprobs=reference,
            )
            out.loss.backward()
            difference = logprob_gap(old, micro.rollout_logprobs)
            outcome.loss += float(out.loss.detach())
            outcome.tokens += out.tokens
            outcome.logprob_gap_max = max(outcome.logprob_gap_max, float(difference.abs_max))
            clip_low += float(out.clip_low_sum)
            clip_high += float(out.clip_high_sum)
            kl += float(out.kl_sum)
            gap += float(difference.abs_sum)
            corrected += float(weights.sum())
        tokens = max(outcome.tokens, 1)
        outcome.clip_low_share, outcome.clip_high_share = clip_low / tokens, clip_high / tokens
        outcome.kl, outcome.logprob_gap, outcome.correction_mean = kl / tokens, gap / tokens, corrected / tokens
        outcome.grad_norm = self._clip()
        return outcome

    def _clip(self) -> float:
        limit = self.max_grad_norm if self.max_grad_norm > 0 else math.inf
        return float(torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), limit))
