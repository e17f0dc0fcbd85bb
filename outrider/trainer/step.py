"""Optimizer steps on a batch: log-probabilities, loss and gradients of each, micro-batch by micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from outrider.algorithm.corrections import logprob_gap, rollout_correction
from outrider.algorithm.losses import LossSpec, StepCounts, policy_loss
from outrider.contract.feed import MiniBatch
from outrider.trainer.clock import StepClock
from outrider.trainer.config import BatchConfig, CorrectionMode
from outrider.trainer.flat import collate_flat, form_flat
from outrider.trainer.layout import answers_for
from outrider.trainer.model import Policy
from outrider.trainer.packing import MicroBatch, collate, form_micro_batches, share_out
from outrider.trainer.ranks import Ranks
from outrider.trainer.sharding import local


@dataclass
class StepOutcome:
    """What a step's forward and backward passes showed. Shares and means are over the trained tokens.

    logprob_gap: mean |trainer - sampler|, of the trainer's policy before the first step on the batch. correction_mean:
    mean weight of the rollout correction, 1 without one. entropy: nats, None where it is not asked for.
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
    entropy: float | None = None


@dataclass
class StepWork:
    """One rank's share of an optimizer step, which --num_iterations may repeat.

    rounds: its micro-batches, as rows of indices into the samples; None where the rank has none in a round of all.
    old, reference: of each round's trained tokens, the log-probabilities of the policy before the first optimizer step
    on the batch, and of the reference model; as many as have been taken so far.
    """

    mini_batch: MiniBatch
    rounds: list[list[list[int]] | None]
    old: list[Tensor] = field(default_factory=list)
    reference: list[Tensor] = field(default_factory=list)


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
        entropy: bool = False,
    ) -> None:
        """reference: for the KL term, None without one. threshold: of the rollout correction. entropy: whether to tell
        the mean entropy of the policy."""
        self.policy, self.reference, self.loss, self.batch = policy, reference, loss, batch
        self.ranks, self.entropy = ranks or Ranks(), entropy
        self.correction, self.threshold, self.max_grad_norm = correction, threshold, max_grad_norm

    def prepare(self, mini_batches: Sequence[MiniBatch], clock: StepClock) -> list[StepWork]:
        """Get ready for the optimizer steps on a batch, before the first of them; with several ranks, all call it with
        the same mini-batches. Steps after the first compare with the policy before it, so that takes a forward pass."""
        with clock.part("collate"):
            works = [StepWork(mini_batch, self._share(mini_batch)) for mini_batch in mini_batches]
        for work in works[1:]:
            for rows in work.rounds:
                micro = self._collate(work, rows, clock)
                with torch.no_grad():
                    work.old.append(self.policy.logprobs(micro))
        return works

    def gradients(self, work: StepWork, clock: StepClock) -> StepOutcome:
        """Leave the step's clipped gradient in the parameters; with several ranks, all call it with their share of the
        same mini-batch. Every micro-batch is divided by the counts of the whole mini-batch, so that how rollouts are
        packed, and shared out over ranks, changes nothing but rounding."""
        # On the device until the end: a number that is read back after each micro-batch would hold up the next one.
        sums = torch.zeros(8, dtype=torch.float64, device=self.policy.device)
        gap_max = torch.zeros((), device=self.policy.device)
        for number, rows in enumerate(work.rounds):
            micro = self._collate(work, rows, clock)
            self.policy.begin_micro_batch(last=number == len(work.rounds) - 1)
            found, largest = self._backward(micro, work, number)
            if rows is not None:
                sums += found
                gap_max = torch.maximum(gap_max, largest)
        self.policy.end_step()
        if not work.rounds:
            self._zero_gradient()
        loss, clip_low, clip_high, kl, gap, corrected, entropy, tokens = self.ranks.sum(
            sums, counts=self.ranks.peer == 0
        ).tolist()
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
            correction_mean=corrected / tokens if tokens else 1.0,
            entropy=entropy / trained if self.entropy else None,
        )

    def _share(self, mini_batch: MiniBatch) -> list[list[list[int]] | None]:
        """This rank's micro-batches."""
        config, policy, samples = self.batch, self.policy, mini_batch.samples
        rollouts, max_tokens = config.per_device_train_batch_size, config.max_tokens_per_micro_batch
        if policy.flat:
            formed = form_flat(samples, rollouts, max_tokens, self.ranks.data_size, policy.break_even)
        else:
            formed = form_micro_batches(samples, rollouts, max_tokens, policy.sharing)
        if self.ranks.data_size == 1:
            return [*formed]
        return share_out(formed, samples, self.ranks.data_size, policy.break_even)[self.ranks.data_rank]

    def _collate(self, work: StepWork, rows: list[list[int]] | None, clock: StepClock) -> MicroBatch:
        samples = work.mini_batch.samples
        with clock.part("collate"):
            # Who has nothing to do in a round computes something all the same: gathering weights and adding up
            # gradients is for all ranks.
            chosen = rows or [[min(range(len(samples)), key=lambda index: len(samples[index].completion))]]
            found = [[samples[index] for index in row] for row in chosen]
            if self.policy.flat:
                return collate_flat([sample for row in found for sample in row], self.policy.device)
            return collate(found, self.policy.device)

    def _backward(self, micro: MicroBatch, work: StepWork, number: int) -> tuple[Tensor, Tensor]:
        """Add the gradient of round ``number``; where this rank has none in it: nothing. Returns its loss and the sums
        over its tokens (clipped low, clipped high, KL, gap, correction, entropy) and their number as one tensor [8],
        and its largest gap."""
        entropy = None
        if self.entropy:
            logprobs, entropy = self.policy.logprobs_and_entropy(micro)
        else:
            logprobs = self.policy.logprobs(micro)
        if number == len(work.old):
            # The first optimizer step on the batch: the policy before it is the policy now, and needs no second pass.
            work.old.append(logprobs.detach())
        if self.reference is not None and number == len(work.reference):
            with torch.no_grad():
                work.reference.append(self.reference.logprobs(micro))
        old = work.old[number]
        weights = rollout_correction(
            old_logprobs=old,
            rollout_logprobs=micro.rollout_logprobs,
            sequence=micro.sequence,
            num_sequences=micro.rollouts,
            mode=self.correction,
            threshold=self.threshold,
        )
        out = policy_loss(
            logprobs=logprobs,
            old_logprobs=old,
            advantages=micro.advantages,
            sequence=micro.sequence,
            spec=self.loss,
            counts=StepCounts(work.mini_batch.sequences, work.mini_batch.tokens),
            correction=weights,
            ref_logprobs=None if self.reference is None else work.reference[number],
        )
        (out.loss * 0.0 if work.rounds[number] is None else out.loss).backward()
        gap = logprob_gap(old, micro.rollout_logprobs)
        none = torch.zeros_like(out.kl_sum)
        sums = (out.loss.detach(), out.clip_low_sum, out.clip_high_sum, out.kl_sum, gap.abs_sum, weights.sum(),
                none if entropy is None else entropy.sum(), none + len(micro.targets))  # fmt: skip
        return torch.stack([value.double() for value in sums]), gap.abs_max

    def _zero_gradient(self) -> None:
        """What a mini-batch without any signal has, which is something else than none: the optimizer's momentum moves
        the weights all the same."""
        for parameter in self.policy.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def _clip(self) -> float:
        """Scale the gradients of all ranks to the largest norm that they may have; the norm that they had."""
        seat = self.ranks.seat()
        gradients = [parameter.grad for parameter in self.policy.model.parameters() if parameter.grad is not None]
        mine = [local(gradient) for gradient in gradients]
        # Not all are shared out in the same way, and several ranks may have the same.
        counted = [local(gradient) for gradient in gradients if answers_for(gradient, seat)]
        square = torch.nn.utils.get_total_norm(counted).to(mine[0].device).square()
        norm = float(self.ranks.sum(square, counts=self.ranks.in_first_copy).sqrt())
        if 0 < self.max_grad_norm < norm:
            torch._foreach_mul_(mine, self.max_grad_norm / (norm + 1e-6))
        return norm
