import math

import pytest

from outrider.observe import figures
from outrider.observe.sparkline import bar, sparkline, stacked
from tests.observe.conftest import WEIRD


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.7134, "0.713"), (12345.6, "12,346"), (1e-6, "1e-06"), (1.25e9, "1.2e+09"),
     (math.nan, "nan"), (-0.5, "-0.5")],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert figures.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.0042, "4.2 ms"), (4.24, "4.2 s"), (59.7, "1:00"), (723, "12:03"), (3723, "1:02:03"),
     (451_000, "5 d 5 h"), (-1, "?"), (math.nan, "?"), (1e308, "?")],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert figures.duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.3, "12 s"), (545, "9 min 5 s"), (7380, "2 h 3 min"), (math.inf, "?")]
)
def test_spelled(seconds: float, text: str) -> None:
    assert figures.spelled(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(950, "950"), (12345, "12,345"), (1.234e6, "1.23M"), (10**30, "1.0e+30")])
def test_compact(value: float, text: str) -> None:
    assert figures.compact(value) == text


@pytest.mark.parametrize(("share", "text"), [(0.123, "12%"), (0.004, "0.4%"), (0, "0%"), (1, "100%")])
def test_percent(share: float, text: str) -> None:
    assert figures.percent(share) == text


@pytest.mark.parametrize("value", WEIRD)
def test_every_value_has_a_short_text(value: float) -> None:
    for text in (figures.number, figures.decimal, figures.compact, figures.percent, figures.duration, figures.spelled):
        assert 0 < len(text(value)) < 16


def test_mean_of_large_values_does_not_overflow() -> None:
    assert figures.mean([1e308, 1e308, math.nan]) == 1e308
    assert math.isnan(figures.mean([math.inf]))


def test_trend_compares_the_latest_values_with_those_before() -> None:
    assert figures.trend([0.0] * 10 + [1.0] * 10) == 1.0
    assert math.isnan(figures.trend([1.0, 2.0, 3.0]))


def test_sparkline_spans_its_height() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == ["▁▂▃▄▅▆▇█"]
    top, bottom = sparkline([0.0, 1.0], 10, 2)
    assert (top, bottom) == (" █", "▁█")


def test_sparkline_averages_more_values_than_columns() -> None:
    (line,) = sparkline([0.0] * 50 + [1.0] * 50, 10)
    assert line == "▁▁▁▁▁█████"


def test_sparkline_of_nothing_constants_and_gaps() -> None:
    assert sparkline([], 10, 2) == ["", ""]
    assert set(sparkline([3.0, 3.0, 3.0], 10)[0]) <= set("▄▅")
    assert sparkline([0.0, math.nan, 1.0], 10) == ["▁ █"]
    assert all(len(line) == 8 for line in sparkline(WEIRD, 10, 3))


@pytest.mark.parametrize("share", [*WEIRD, 0.5, 2.0])
def test_a_bar_has_its_width(share: float) -> None:
    assert len("".join(bar(share, 10))) == 10


def test_parts_of_a_whole_fill_their_width() -> None:
    assert stacked([0.5, 0.25, 0.25], 8) == [4, 2, 2]
    assert stacked([1.0, 1.0, 1.0], 10) == [4, 3, 3]
    assert stacked([0.97, 0.03], 10) == [10, 0]
    assert stacked([], 10) == []
    assert stacked([0.0, math.nan], 10) == [0, 0]


@pytest.mark.parametrize("share", WEIRD)
def test_parts_of_any_size_stay_inside(share: float) -> None:
    cells = stacked([share, 0.5, share], 10)
    assert sum(cells) in (0, 10)
    assert min(cells) >= 0
