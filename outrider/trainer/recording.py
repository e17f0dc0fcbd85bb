"""From what happened in a step to a row of ``metrics.jsonl``."""

import msgspec

from outrider.contract.feed import BatchStats, EvalFigures, EvalResult
from outrider.observe.records import EvalRecord, StepRecord
from outrider.trainer.clock import StepTimes
from outrider.trainer.step import StepOutcome


def step_record(
    stats: BatchStats,
    outcome: StepOutcome,
    times: StepTimes,
    step: int,
    version: int,
    max_steps: int,
    time: float,
    rate: float,
) -> StepRecord:
    """The row of one optimizer step. version: that its batch trains; time: seconds since the first step began; rate:
    the learning rate."""
    whole = max(times.whole, 1e-9)
    return StepRecord(
        **msgspec.structs.asdict(stats),
        step=step,
        version=version,
        max_steps=max_steps,
        time=time,
        seconds=times.whole,
        wait_seconds=times.wait,
        collate_seconds=times.collate,
        train_seconds=times.train,
        publish_wait_seconds=times.publish_wait,
        save_seconds=times.save,
        other_seconds=times.other,
        trainer_idle_share=times.wait / whole,
        loss=outcome.loss,
        grad_norm=outcome.grad_norm,
        learning_rate=rate,
        clip_low_share=outcome.clip_low_share,
        clip_high_share=outcome.clip_high_share,
        kl=outcome.kl,
        logprob_gap=outcome.logprob_gap,
        logprob_gap_max=outcome.logprob_gap_max,
        correction_mean=outcome.correction_mean,
        entropy=msgspec.UNSET if outcome.entropy is None else outcome.entropy,
        tokens_trained=outcome.tokens,
        tokens_per_second=stats.rollout_tokens / max(stats.batch_seconds, 1e-9),
    )


def eval_record(result: EvalResult, time: float) -> EvalRecord:
    """The row of one evaluation. time: seconds since the first step began."""
    figures = {name: getattr(result, name) for name in EvalFigures.__struct_fields__}
    return EvalRecord(time=time, **figures)
