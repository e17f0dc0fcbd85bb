"""The built-in reward functions on text whose reward can be told by reading, good and bad."""

import importlib.util
import logging
import math
import re
import subprocess
import sys
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.contract.errors import UserError
from outrider.rewards import accuracy as accuracy_module
from outrider.rewards.accuracy import accuracy
from outrider.rewards.exact_match import exact_match
from outrider.rewards.format import format_reward
from outrider.rewards.repetition import repetition
from outrider.rewards.settings import RewardSettings
from outrider.rewards.soft_overlong import soft_overlong


class TestAccuracy:
    @pytest.mark.parametrize(
        ("completion", "solution", "expected"),
        [
            ("The answer is \\boxed{4}.", "4", 1.0),
            ("The answer is 5", "4", 0.0),
            ("so it must be 0.5", "$\\frac{1}{2}$", 1.0),
            ("\\boxed{\\frac{2}{4}}", "$\\frac{1}{2}$", 1.0),
            ("<think>is it 3?</think><answer>4</answer>", "4", 1.0),
            ("<answer>3</answer> no, <answer>4</answer>", "4", 1.0),
            ("<answer>4</answer> no, <answer>3</answer>", "4", 0.0),
            ("<answer>4", "4", 0.0),
            ("7 apples", "<answer>7</answer>", 1.0),
            ("seven", "7", 0.0),
            ("", "7", 0.0),
            ("1234", "1,234", 1.0),
            ("#### 72", "#### 72", 1.0),
        ],
    )
    def test_judged_by_math_verify(self, completion: str, solution: str, expected: float) -> None:
        assert accuracy([completion], solution=[solution]) == [expected]

    @pytest.mark.parametrize(
        ("completion", "solution", "expected"),
        [
            (" 4\n", "4", 1.0),
            ("4.0", "4", 1.0),
            ("-04.50", "-4.5", 1.0),
            ("+.5", "0.5", 1.0),
            ("0.333", "0.3333", 0.0),
            ("123456789012345678901234567891", "123456789012345678901234567890", 0.0),
            ("<answer> 12 </answer>", "12.", 1.0),
            ("7", 7, 1.0),
            ("0.5", 0.5, 1.0),
        ],
    )
    def test_numerals_are_compared_without_math_verify(
        self, completion: str, solution: Any, expected: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(accuracy_module, "_math_verify", lambda: pytest.fail("math-verify was called"))
        assert accuracy([completion], solution=[solution]) == [expected]

    def test_no_opinion_without_a_readable_solution(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            rewards = accuracy(["4", "4", "4"], solution=["no numbers in here", None, "no numbers in here"])
        assert rewards == [None, None, None]
        assert caplog.text.count("no numbers in here") == 1
        assert "delimiters" in caplog.text

    def test_works_outside_the_main_thread(self) -> None:
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(accuracy(["is 4"], solution=["$2^2$"])))
        thread.start()
        thread.join()
        assert results == [[1.0]]

    def test_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        accuracy_module._math_verify.cache_clear()
        with pytest.raises(UserError, match=r"pip install 'outrider\[math\]'"):
            accuracy(["four"], solution=["4"])

    def test_a_column_of_another_length_is_refused(self) -> None:
        with pytest.raises(ValueError, match="shorter"):
            accuracy(["4", "5"], solution=["4"])

    def test_loading_it_does_not_import_math_verify(self) -> None:
        code = "import sys, outrider.rewards.loading; sys.exit(bool({'sympy', 'torch'} & {*sys.modules}))"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestFormat:
    @pytest.mark.parametrize(
        ("completion", "expected"),
        [
            ("<think>a</think><answer>b</answer>", 1.0),
            ("<think>a\nb</think>\n \t<answer>c\nd</answer>", 1.0),
            ("<think></think><answer></answer>", 1.0),
            ("<think>a</think> so <answer>b</answer>", 0.0),
            (" <think>a</think><answer>b</answer>", 0.0),
            ("<think>a</think><answer>b</answer>\n", 0.0),
            ("<think>a</think><answer>b", 0.0),
            ("<answer>b</answer>", 0.0),
            ("<think></answer>", 0.0),
            ("", 0.0),
        ],
    )
    def test_full_match(self, completion: str, expected: float) -> None:
        assert format_reward([completion], solution=["b"]) == [expected]

    @settings(deadline=None)
    @given(
        st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "x"]), max_size=9).map(
            "".join
        )
    )
    def test_agrees_with_the_regular_expression(self, completion: str) -> None:
        match = re.fullmatch(r"<think>.*?</think>\s*<answer>.*?</answer>", completion, re.DOTALL)
        assert format_reward([completion]) == [float(match is not None)]


class TestRepetition:
    @pytest.mark.parametrize(
        ("completion", "expected"),
        [
            ("a b c d e", 0.0),
            ("a a a a a", -(1 - 1 / 3)),
            ("A a a a  a\n", -(1 - 1 / 3)),
            ("a b a b a b", -(1 - 2 / 4)),
            ("a a", 0.0),
            ("", 0.0),
            ("哈" * 50, 0.0),
        ],
    )
    def test_by_hand(self, completion: str, expected: float) -> None:
        assert repetition([completion]) == [pytest.approx(expected)]

    def test_settings_count(self) -> None:
        assert repetition(["a a a"], n_grams=1, max_penalty=-3.0) == [pytest.approx(-2.0)]

    @settings(deadline=None)
    @given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 4))
    def test_follows_the_formula(self, words: list[str], n: int) -> None:
        seen: list[list[str]] = []
        total = 0
        for start in range(len(words)):
            if start + n <= len(words):
                total += 1
                if words[start : start + n] not in seen:
                    seen.append(words[start : start + n])
        expected = (1 - len(seen) / total) * -1.0 if total else 0.0
        assert repetition([" ".join(words)], n_grams=n) == [pytest.approx(expected)]


class TestSoftOverlong:
    @pytest.mark.parametrize(
        ("length", "expected"), [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (110, -1.5)]
    )
    def test_by_hand(self, length: int, expected: float) -> None:
        rewards = soft_overlong(["text"], soft_max_length=100, soft_cache_length=20, completion_ids=[[7] * length])
        assert rewards == [pytest.approx(expected)]
        assert math.copysign(1.0, rewards[0] or 0.0) == (1.0 if length <= 80 else -1.0)


class TestExactMatch:
    def test_by_hand(self) -> None:
        rewards = exact_match([" 7\n", "7.0", "8", "x"], solution=[7, "7", "8 ", None])
        assert rewards == [1.0, 0.0, 1.0, None]


class TestSettings:
    def test_lengths_of_soft_overlong(self) -> None:
        assert RewardSettings(soft_cache_length=64).soft_lengths() == (512, 64)
        assert RewardSettings(soft_max_length=100, soft_cache_length=20).soft_lengths() == (100, 20)

    @pytest.mark.parametrize("cache", [None, 0, -1, 513])
    def test_bad_cache_length(self, cache: int | None) -> None:
        with pytest.raises(UserError, match="--soft_cache_length"):
            RewardSettings(soft_cache_length=cache).soft_lengths()

    @pytest.mark.parametrize("change", [{"repetition_n_grams": 0}, {"repetition_max_penalty": 1.0}])
    def test_bad_repetition(self, change: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=f"--{next(iter(change))}"):
            RewardSettings(**change)
