"""From rewards to advantages. NumPy only: the collector computes these, and its process loads no torch."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

ScaleRewards = Literal["group", "batch", "none"]

# Added to the standard deviation, so that a group whose rewards are nearly equal is not blown up.
STD_FLOOR = 1e-4
# Rewards closer than this are equal: float noise from a weighted sum is not a preference.
EQUAL_WITHIN = 1e-9


def combine_rewards(per_function: Sequence[Sequence[float | None]], weights: Sequence[float]) -> NDArray[np.float64]:
    """Weighted sum of several reward functions: R_i = Σ_f w_f · r_f,i over the functions with an opinion.

    per_function[f][i] is what function f gave rollout i; None (or NaN) means that it has no opinion, and
    then it adds nothing. Returns float64[rollouts], with NaN where no function has an opinion: such a
    rollout cannot be trained on, and the caller drops it. ValueError if the lengths do not fit.
    """
    if not per_function:
        raise ValueError("no reward function: give at least one, or there is nothing to learn from")
    if len(per_function) != len(weights):
        raise ValueError(f"{len(per_function)} reward functions but {len(weights)} weights: give one weight each")
    lengths = [len(rewards) for rewards in per_function]
    if len(set(lengths)) > 1:
        raise ValueError(f"reward functions returned {lengths} rewards: each must return one per rollout")
    # dtype=float turns None into NaN.
    rewards = np.array([list(row) for row in per_function], dtype=np.float64)
    silent = np.isnan(rewards)
    total = (np.where(silent, 0.0, rewards) * np.asarray(weights, dtype=np.float64)[:, None]).sum(axis=0)
    total[silent.all(axis=0)] = np.nan
    return total


def group_advantages(rewards: NDArray[np.float64], scale_rewards: ScaleRewards) -> NDArray[np.float64]:
    """Group-relative advantages: A_g,i = (R_g,i − mean_i R_g,i) / (s_g + 1e-4).

    rewards and the result are float64[groups, G]. The scale s_g has Bessel's correction and is

    - "group": the standard deviation of group g (GRPO, arXiv 2402.03300);
    - "batch": the standard deviation of all rewards given here (arXiv 2508.08221);
    - "none": absent; the advantage is not divided (Dr. GRPO, arXiv 2503.20783).

    ValueError for groups of one, whose advantage would always be 0, and for rewards that are not finite.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 2:
        raise ValueError(f"rewards have shape {rewards.shape}: expected [groups, G]")
    if rewards.shape[1] < 2:
        raise ValueError(
            "a group of one rollout has no advantage, for it is compared with itself: "
            "set --num_generations to 2 or more"
        )
    bad = np.flatnonzero(~np.isfinite(rewards).all(axis=1))
    if bad.size:
        raise ValueError(
            f"group {bad[0]} has rewards {rewards[bad[0]].tolist()}: drop rollouts without a finite reward "
            "before computing advantages"
        )
    centered = rewards - rewards.mean(axis=1, keepdims=True)
    match scale_rewards:
        case "group":
            return centered / (rewards.std(axis=1, ddof=1, keepdims=True) + STD_FLOOR)
        case "batch":
            # A batch without groups has no standard deviation, and nothing to divide either.
            return centered / (rewards.std(ddof=1) + STD_FLOOR) if rewards.size else centered
        case "none":
            return centered
        case _:
            raise ValueError(f"scale_rewards is {scale_rewards!r}: choose group, batch or none")


def has_signal(rewards: NDArray[np.float64]) -> bool:
    """Whether a group, float64[G], has something to learn from: its rewards are not all equal (within 1e-9).

    The test behind dynamic sampling (DAPO, arXiv 2503.14476): equal rewards mean advantages of zero.
    """
    return bool(np.ptp(rewards) > EQUAL_WITHIN)
