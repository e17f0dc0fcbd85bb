"""Rows with every field set to something plausible."""

from typing import Any

from outrider.contract.rollouts import RolloutRow
from outrider.observe.records import EvalRecord, StepRecord


def make_step(step: int, max_steps: int = 10, **fields: Any) -> StepRecord:
    values: dict[str, Any] = {
        "version": step - 1, "time": step * 2.0,
        "seconds": 2.0, "wait_seconds": 0.3, "collate_seconds": 0.04, "train_seconds": 1.5,
        "publish_wait_seconds": 0.01, "save_seconds": 0.1, "other_seconds": 0.05, "trainer_idle_share": 0.15,
        "batch_seconds": 2.0, "generation_busy_seconds": 1.8, "generation_idle_seconds": 0.15,
        "generation_down_seconds": 0.05, "generation_idle_share": 0.1, "reward_wait_seconds": 0.05,
        "pack_seconds": 0.002, "loss": 0.01,
        "grad_norm": 0.4, "learning_rate": 1e-6, "reward": 0.05 * step, "reward_std": 0.2,
        "rewards": {"accuracy": 0.05 * step}, "completion_length": 120.5, "completion_length_max": 256,
        "truncated_share": 0.02, "staleness_mean": 0.7, "staleness_max": 1, "clip_low_share": 0.001,
        "clip_high_share": 0.002, "kl": 0.0004, "logprob_gap": 0.002, "logprob_gap_max": 0.4,
        "correction_mean": 0.99, "entropy": 1.2, "groups": 16, "groups_zero_variance": 3, "groups_failed": 1,
        "groups_stale": 0, "prompts_rejected": 0, "tokens_trained": 12000, "tokens_per_second": 6000.0,
        "reward_seconds": 0.2, "stage_seconds": 0.3, "commit_seconds": 0.004, "epoch": 0.1 * step,
    }  # fmt: skip
    values["rollout_tokens"] = 900
    return StepRecord(step=step, max_steps=max_steps, **{**values, **fields})


def make_evaluation(step: int, **fields: Any) -> EvalRecord:
    values: dict[str, Any] = {
        "time": step * 2.0, "version_min": step, "version_max": step, "reward": 0.1 + 0.05 * step,
        "rewards": {"accuracy": 0.1}, "count": 64, "failed": 0, "completion_length": 100.0, "seconds": 3.0,
    }  # fmt: skip
    return EvalRecord(step=step, **{**values, **fields})


def make_rollout(index: int, reward: float | None, **fields: Any) -> RolloutRow:
    values: dict[str, Any] = {
        "group": 7, "step": 5, "state": "trained", "reason": None, "prompt": f"prompt {index}",
        "completion": f"completion {index}", "tokens": 12, "rewards": {"accuracy": reward}, "advantage": 0.5,
        "finish_reason": "stop", "versions": [(2, 4), (3, 8)], "server": "http://127.0.0.1:8000",
    }  # fmt: skip
    return RolloutRow(index=index, reward=reward, **{**values, **fields})
