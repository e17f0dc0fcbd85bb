"""The rows of ``metrics.jsonl``: one ``StepRecord`` an optimizer step, one ``EvalRecord`` an evaluation."""

from msgspec import UNSET, UnsetType

from outrider.contract.feed import BatchStats, EvalFigures


class StepRecord(BatchStats, kw_only=True, tag_field="kind", tag="step"):
    """One optimizer step, and what the collector says of its batch: the same in the rows of all steps on one batch.

    Times in seconds; shares between 0 and 1; ``time`` since the first step began.

    step counts from 1; version: that the batch trains, which is how many batches were trained before it. seconds:
    wall clock from the previous step's end to this one's; it is the sum of wait (for a batch), collate (rollouts to
    tensors), train (forward, backward, optimizer), publish_wait (for weights to be copied out), save (what of a
    checkpoint is not written beside training) and other.
    What the servers do meanwhile is in ``batch_seconds`` and its parts; it is counted from batch to batch, so with
    K > 0 it belongs to the batch and not to the very moments of this step.
    logprob_gap: mean |trainer - sampler| log-probability of the trained tokens, before the first step on the batch; at
    K = 0 it is numerical noise, at K > 0 it also holds what the policy has moved since.
    entropy: nats, of the policy over the trained tokens; absent without --log_entropy.
    tokens_per_second: that the servers sampled, from batch to batch.
    """

    step: int
    version: int
    max_steps: int
    time: float
    seconds: float
    wait_seconds: float
    collate_seconds: float
    train_seconds: float
    publish_wait_seconds: float
    save_seconds: float
    other_seconds: float
    trainer_idle_share: float
    loss: float
    grad_norm: float
    learning_rate: float
    clip_low_share: float
    clip_high_share: float
    kl: float
    logprob_gap: float
    logprob_gap_max: float
    correction_mean: float
    entropy: float | UnsetType = UNSET
    tokens_trained: int
    tokens_per_second: float


class EvalRecord(EvalFigures, kw_only=True, tag_field="kind", tag="evaluation"):
    """One evaluation on held-out prompts. time: seconds since the first step began."""

    time: float


MetricsRow = StepRecord | EvalRecord
