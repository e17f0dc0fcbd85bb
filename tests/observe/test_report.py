import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from msgspec import UNSET

from outrider.observe.charts import Chart, render_chart
from outrider.observe.records import MetricsRow, StepRecord
from outrider.observe.report import ReportExample, write_report
from tests.observe.build import make_evaluation, make_step
from tests.observe.conftest import WEIRD

_VOID = {"meta"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"

    def count(self, tag: str, css: str = "") -> int:
        return sum(name == tag and css in (attrs.get("class") or "") for name, attrs in self.tags)


def report(tmp_path: Path, rows: list[MetricsRow], **options: Any) -> tuple[Page, str]:
    path = tmp_path / "report.html"
    write_report(path, **{"title": "run", "config": {}, "rows": rows, "summary": {}, **options})
    text = path.read_text(encoding="utf-8")
    return Page(text), text


def coordinates(text: str) -> list[float]:
    attributes = re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy|width|height)="([^"%]+)"', text)
    points = re.findall(r'points="([^"]*)"', text)
    return [float(value) for value in attributes] + [
        float(v) for p in points for pair in p.split() for v in pair.split(",")
    ]


def test_a_whole_run(tmp_path: Path) -> None:
    rows: list[MetricsRow] = [make_evaluation(0)]
    for step in range(1, 201):
        rows.append(make_step(step, 200, reward=step / 200))
        rows += [make_evaluation(step, reward=step / 200)] if step % 20 == 0 else []
    page, text = report(tmp_path, rows, summary={"Servers": 4, "Held-out reward": "0.1 → 1"}, max_staleness=2)
    for expected in (
        "200 of 200", "6 min 40 s", "0.1 → 1", "Servers", "K 2", "Held-out reward over time", "minutes",
        "train: 5 min 0 s, 75%", "collate: 8.0 s, 2%", "generate: 6 min 0 s, 90%", "wait for rewards: 10 s, 2%",
        "beside it: rewards 40 s, stage 60 s",
    ):  # fmt: skip
        assert expected in page.text
    assert "0.100 → 1.000" not in page.text  # replaced by the summary's
    assert page.count("svg") == 20
    assert page.count("polygon", "band") > 0
    assert page.count("title") > 300
    assert text.startswith("<!DOCTYPE html>")
    assert not (tmp_path / "report.html.tmp").exists()


def test_entropy_is_shown_where_it_is_known(tmp_path: Path) -> None:
    with_it, _ = report(tmp_path, [make_step(1), make_step(2)])
    without, _ = report(tmp_path, [make_step(1, entropy=UNSET), make_step(2, entropy=UNSET)])
    assert "Entropy" in with_it.text
    assert "Entropy" not in without.text


def test_it_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page, text = report(tmp_path, [make_evaluation(0), make_step(1)])
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert not any(name in ("src", "href") or name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "http" not in text
    assert "@import" not in text


def test_everything_is_escaped(tmp_path: Path) -> None:
    bad = "<script>alert('x')</script>&amp;\"</pre>"
    example = ReportExample(prompt=bad, before=bad, after=bad, before_reward=0.0, after_reward=1.0)
    page, text = report(
        tmp_path,
        [make_step(1, rewards={bad: 0.1, "other": 0.2})],
        title=bad,
        summary={bad: bad},
        config={"vllm_server_api_key": "the-key", "option": bad},
        examples=[example, ReportExample(prompt="p", before=None, after="a", before_reward=None, after_reward=1.0)],
    )
    assert "<script" not in text
    assert page.count("script") == 0
    assert page.text.count(bad) >= 6
    assert "not sampled" in page.text
    assert "the-key" not in text
    assert "(hidden)" in page.text


@pytest.mark.parametrize(
    "rows", [[], [make_evaluation(0)], [make_step(1)], [make_step(1), make_step(2)]], ids=["none", "eval", "one", "two"]
)
def test_short_runs(tmp_path: Path, rows: list[MetricsRow]) -> None:
    page, text = report(tmp_path, rows, max_staleness=0, logprob_gap_alarm=0.1)
    assert all(-1 <= value <= 400 for value in coordinates(text))
    # Every chart either has a drawing or says why not.
    assert page.count("svg") + page.text.count("no data") in (20, 21)


def test_weird_rows(tmp_path: Path, weird_step: StepRecord) -> None:
    rows = [weird_step, make_step(4), make_evaluation(4, reward=weird_step.reward, time=weird_step.time)]
    _, text = report(tmp_path, rows, max_staleness=1, logprob_gap_alarm=0.1)
    assert all(-1 <= value <= 400 for value in coordinates(text))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [[5.0], [5.0, 5.0, 5.0], [0.0, 0.0], [-3.0, -3.0], [1e-300, 1e99], WEIRD, [0.1] * 500]
)
def test_a_chart_of_any_values_stays_inside(values: list[float], log: bool) -> None:
    text = render_chart(Chart(title="c", x=list(range(len(values))), series={"a": values, "b": values[::-1]}, log=log))
    Page(text)
    assert all(-1 <= value <= 400 for value in coordinates(text))


def test_a_constant_runs_through_the_middle() -> None:
    text = render_chart(Chart(title="c", x=[1, 2, 3], series={"a": [0.7, 0.7, 0.7]}))
    (points,) = re.findall(r'polyline class="curve c0" points="([^"]*)"', text)
    heights = {float(pair.split(",")[1]) for pair in points.split()}
    assert len(heights) == 1
    assert 50 < heights.pop() < 130


def test_gaps_break_the_curve_and_a_single_point_is_seen() -> None:
    text = render_chart(
        Chart(title="c", x=list(range(60)), series={"a": [1.0] * 20 + [float("nan")] * 19 + [2.0] * 21})
    )
    assert text.count("polyline") == 2
    alone = [float("nan")] * 59 + [1.0]
    assert render_chart(Chart(title="c", x=list(range(60)), series={"a": alone})).count("<circle") == 1


def test_tooltips_tell_values() -> None:
    text = render_chart(Chart(title="c", x=[1, 2], series={"a": [0.5, 0.6], "b": [1.0, 2.0]}))
    assert "<title>step 1\na: 0.5\nb: 1</title>" in text
    stacked = render_chart(Chart(title="c", x=[1], series={"wait": [0.5], "train": [1.5]}, stacked=True, floor=0))
    assert "<title>step 1\nwait: 0.5\ntrain: 1.5</title>" in stacked
    many = render_chart(Chart(title="c", x=list(range(180)), series={"a": [float(i % 2) for i in range(180)]}))
    assert "<title>step 0–1\na: 0.5 (0 to 1)</title>" in many
