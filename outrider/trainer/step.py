"""One optimizer step: log-probabilities, loss and gradients of a batch, micro-batch by micro-batch."""

import math
from dataclasses import dataclass

import torch

from outrider.algorithm.corrections import logprob_gap, rollout_correction
from outrider.algorithm.losses import LossSpec, StepCounts, policy_loss
from outrider.contract.feed import Batch
from outrider.trainer.clock import StepClock
from outrider.trainer.config import BatchConfig, CorrectionMode
from outrider.trainer.model import Policy
from outrider.trainer.packing import MicroBatch, collate, form_micro_batches, share_out
from outrider.trainer.ranks import Ranks
from outrider.trainer.sharding import whole_tensor


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
        ranks: Ranks | None = None,
    ) -> None:
        """reference: for the KL term, None without one. threshold: of the rollout correction."""
        self.policy, self.reference, self.loss, self.batch = policy, reference, loss, batch
        self.ranks = ranks or Ranks()
        self.correction, self.threshold, self.max_grad_norm = correction, threshold, max_grad_norm

    def gradients(self, batch: Batch, clock: StepClock) -> StepOutcome:
        """Leave the step's clipped gradient in the parameters; with several ranks, all call it with the same batch.
        Every micro-batch is divided by the counts of the whole step, so that how rollouts are packed, and shared out
        over ranks, changes nothing but rounding."""
        samples = batch.samples
        counts = StepCounts(batch.sequences, batch.tokens)
        # On the device until the end: a number that is read back after each micro-batch would hold up the next one.
        sums = torch.zeros(7, dtype=torch.float64, device=self.policy.device)
        gap_max = torch.zeros((), device=self.policy.device)
        with clock.part("collate"):
            mine = self._share(batch)
        for rows in mine:
            with clock.part("collate"):
                # Who has nothing to do in a round computes something all the same: gathering weights and adding up
                # gradients is for all ranks.
                chosen = rows or [[min(range(len(samples)), key=lambda index: len(samples[index].completion))]]
                micro = collate([[samples[index] for index in row] for row in chosen], self.policy.device)
            found, largest = self._backward(micro, counts, idle=rows is None)
            if rows is not None:
                sums += found
                gap_max = torch.maximum(gap_max, largest)
        loss, clip_low, clip_high, kl, gap, corrected, tokens = self.ranks.sum(sums).tolist()
        gap_max = self.ranks.maximum(gap_max)
        trained = max(tokens, 1)
        return StepOutcome(
            loss=loss,
            grad_norm=self._clip(),
            tokens=int(tokens),
            clip_low_share=clip_low / trained,
            clip_high_share=clip_high / trained,
            kl=kl / trained,
            logprob_gap=gap / trained,
            logprob_gap_max=float(gap_max),
            correction_mean=corrected / trained,
        )

    def _share(self, batch: Batch) -> list[list[list[int]] | None]:
        """This rank's micro-batches."""
        config, sharing = self.batch, self.policy.sharing
        formed = form_micro_batches(
            batch.samples, config.per_device_train_batch_size, config.max_tokens_per_micro_batch, sharing
        )
        if self.ranks.size == 1:
            return [*formed]
        break_even = sharing.break_even if sharing else math.inf
        return share_out(formed, batch.samples, self.ranks.size, break_even)[self.ranks.rank]

    def _backward(self, micro: MicroBatch, counts: StepCounts, idle: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a micro-batch's gradient; idle: nothing. Returns its loss and the sums over its tokens (clipped low,
        clipped high, KL, gap, correction) and their number as one tensor [7], and its largest gap."""
        logprobs = self.policy.logprobs(micro)
        # One optimizer step a batch: the policy before the step is the policy now, and needs no second pass.
        old = logprobs.detach()
        weights = rollout_correction(
            old_logprobs=old,
            rollout_logprobs=micro.rollout_logprobs,
            sequence=micro.sequence,
            num_sequences=micro.rollouts,
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
        (out.loss * 0.0 if idle else out.loss).backward()
        gap = logprob_gap(old, micro.rollout_logprobs)
        sums = (out.loss.detach(), out.clip_low_sum, out.clip_high_sum, out.kl_sum, gap.abs_sum, weights.sum(),
                torch.full_like(weights.sum(), len(micro.targets)))  # fmt: skip
        return torch.stack([value.double() for value in sums]), gap.abs_max

    def _clip(self) -> float:
        limit = self.max_grad_norm if self.max_grad_norm > 0 else math.inf
        return float(whole_tensor(torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), limit)))
