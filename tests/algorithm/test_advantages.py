"""Advantages against formulas written out with plain Python floats."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.algorithm.advantages import combine_rewards, group_advantages, has_signal

reward_batches = st.integers(1, 4).flatmap(
    lambda groups: st.integers(2, 6).flatmap(
        lambda size: st.lists(
            st.lists(st.floats(-10, 10), min_size=size, max_size=size), min_size=groups, max_size=groups
        )
    )
)


def bessel_std(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def reference(rewards: list[list[float]], scale: str) -> list[list[float]]:
    everything = [value for group in rewards for value in group]
    result = []
    for group in rewards:
        mean = sum(group) / len(group)
        divisor = 1.0
        if scale == "group":
            divisor = bessel_std(group) + 1e-4
        if scale == "batch":
            divisor = bessel_std(everything) + 1e-4
        result.append([(value - mean) / divisor for value in group])
    return result


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@settings(deadline=None)
@given(rewards=reward_batches)
def test_advantages_follow_the_formula_and_sum_to_zero(scale: str, rewards: list[list[float]]) -> None:
    advantages = group_advantages(np.array(rewards), scale)
    assert advantages.dtype == np.float64
    np.testing.assert_allclose(advantages, reference(rewards, scale), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(advantages.sum(axis=1), 0.0, atol=1e-9)


def test_advantages_by_hand() -> None:
    # mean 0.5; Bessel std of (1, 0, 0, 1) is sqrt(1/3)
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    advantages = group_advantages(np.array([[1.0, 0.0, 0.0, 1.0]]), "group")
    np.testing.assert_allclose(advantages, [[expected, -expected, -expected, expected]])


def test_equal_rewards_give_zero() -> None:
    assert not group_advantages(np.full((2, 4), 0.5), "group").any()


def test_no_groups_give_no_advantages() -> None:
    for scale in ("group", "batch", "none"):
        assert group_advantages(np.zeros((0, 8)), scale).shape == (0, 8)


def test_bad_rewards_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="num_generations"):
        group_advantages(np.zeros((3, 1)), "group")
    with pytest.raises(ValueError, match="group 1 has rewards"):
        group_advantages(np.array([[0.0, 1.0], [0.0, math.nan]]), "batch")
    with pytest.raises(ValueError, match=r"expected \[groups, G\]"):
        group_advantages(np.zeros(4), "group")
    with pytest.raises(ValueError, match="choose group, batch or none"):
        group_advantages(np.zeros((1, 4)), "groups")  # type: ignore[arg-type]


def test_rewards_are_weighted_and_none_is_ignored() -> None:
    combined = combine_rewards([[1.0, None, 0.5, None], [2.0, 3.0, None, None]], [1.0, 0.5])
    np.testing.assert_array_equal(combined, [2.0, 1.5, 0.5, math.nan])


def test_an_opinion_of_weight_zero_is_still_an_opinion() -> None:
    np.testing.assert_array_equal(combine_rewards([[1.0]], [0.0]), [0.0])


def test_rewards_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 reward functions but 1 weights"):
        combine_rewards([[1.0], [1.0]], [1.0])
    with pytest.raises(ValueError, match=r"returned \[1, 2\] rewards"):
        combine_rewards([[1.0], [1.0, 2.0]], [1.0, 1.0])
    with pytest.raises(ValueError, match="no reward function"):
        combine_rewards([], [])


def test_signal_needs_a_difference_above_float_noise() -> None:
    assert has_signal(np.array([0.0, 1.0, 0.0]))
    assert not has_signal(np.array([0.3, 0.3, 0.3]))
    assert not has_signal(np.array([0.1 + 0.2, 0.3]))


def test_the_collector_gets_advantages_without_torch() -> None:
    code = "import sys, outrider.algorithm.advantages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
