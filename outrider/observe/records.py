"""The rows of ``metrics.jsonl``: one ``StepRecord`` an optimizer step, one ``EvalRecord`` an evaluation."""

import msgspec


class StepRecord(msgspec.Struct, kw_only=True, tag_field="kind", tag="step"):
    """One optimizer step. Times in seconds; shares between 0 and 1; ``time`` since the first step began.

    step counts from 1: the step that made version ``step``. seconds: wall clock from the previous step's end to
    this one's; it is the sum of wait, train, publish_wait, save and other.
    logprob_gap: mean |trainer - sampler| log-probability of the trained tokens, before the update; at K = 0 it is
    numerical noise, at K > 0 it also holds what the policy has moved since.
    """

    step: int
    max_steps: int
    time: float
    seconds: float
    wait_seconds: float
    train_seconds: float
    publish_wait_seconds: float
    save_seconds: float
    trainer_idle_share: float
    generation_idle_share: float
    loss: float
    grad_norm: float
    learning_rate: float
    reward: float
    reward_std: float
    rewards: dict[str, float]
    completion_length: float
    completion_length_max: int
    truncated_share: float
    staleness_mean: float
    staleness_max: int
    clip_low_share: float
    clip_high_share: float
    kl: float
    logprob_gap: float
    logprob_gap_max: float
    correction_mean: float
    groups: int
    groups_zero_variance: int
    groups_failed: int
    groups_stale: int
    prompts_rejected: int
    tokens_trained: int
    tokens_per_second: float
    reward_seconds: float
    stage_seconds: float
    commit_seconds: float
    epoch: float


class EvalRecord(msgspec.Struct, kw_only=True, tag_field="kind", tag="evaluation"):
    """One evaluation on held-out prompts, sampled with versions ``version_min`` to ``version_max``."""

    step: int
    time: float
    version_min: int
    version_max: int
    reward: float
    rewards: dict[str, float]
    count: int
    failed: int
    completion_length: float
    seconds: float


MetricsRow = StepRecord | EvalRecord
