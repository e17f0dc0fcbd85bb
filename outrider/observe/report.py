"""``report.html``: one run on one page, which needs no network and runs no scripts."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import msgspec

from outrider.observe.charts import Chart, render_chart
from outrider.observe.figures import compact, decimal, duration, number, percent, spelled
from outrider.observe.headline import headline
from outrider.observe.metrics import evaluations_of, steps_of
from outrider.observe.parts import BESIDE, SERVERS, TRAINER, Parts, one_a_batch, totals
from outrider.observe.records import EvalRecord, MetricsRow, StepRecord
from outrider.observe.report_style import STYLE
from outrider.observe.secrets import without_secrets


class ReportExample(msgspec.Struct, kw_only=True):
    """One held-out prompt, completed by the weights the run began with and by those it ended with.

    before and its reward: None if nothing was sampled before the first step.
    """

    prompt: str
    before: str | None
    after: str
    before_reward: float | None
    after_reward: float


def write_report(
    path: Path,
    *,
    title: str,
    config: Mapping[str, Any],
    rows: list[MetricsRow],
    summary: Mapping[str, str | float | int],
    examples: Sequence[ReportExample] = (),
    max_staleness: int | None = None,
    logprob_gap_alarm: float | None = None,
) -> None:
    """Write the page, whole or not at all.

    config: the resolved flags; secrets in it are hidden. summary: further headline figures by name, shown after
    those of the rows; one of the same name replaces it. max_staleness and logprob_gap_alarm: marked in the curves.
    """
    steps, evaluations = steps_of(rows), evaluations_of(rows)
    body = [
        f"<header><p>outrider</p><h1>{escape(title)}</h1></header>",
        _tiles({**headline(rows), **{name: _figure(value) for name, value in summary.items()}}),
        _section("Reward", _reward_charts(steps, evaluations)),
        _section("Rollouts", _rollout_charts(steps, max_staleness)),
        _section("Update", _update_charts(steps, logprob_gap_alarm)),
        _time_section(steps),
        _examples(examples),
        _configuration(config),
        "<footer>Curves of more than 90 points are drawn as means of neighbours, in a band from lowest to highest. "
        "Values are told where the pointer rests.</footer>",
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} – outrider</title><style>{STYLE}</style></head>\n"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(path)


def _reward_charts(steps: list[StepRecord], evaluations: list[EvalRecord]) -> list[Chart]:
    held_out = {"held-out": [record.reward for record in evaluations]}
    times = [record.time for record in evaluations]
    unit, seconds = _time_unit(times)
    functions = list(dict.fromkeys(name for step in steps for name in step.rewards))
    training = {"reward": [step.reward for step in steps]}
    if len(functions) > 1:  # a single one is the reward
        training |= {name: [step.rewards.get(name, math.nan) for step in steps] for name in functions}
    return [
        Chart(
            title="Held-out reward",
            x=[float(record.step) for record in evaluations],
            series=held_out,
            format=_reward,
            x_format=_whole,
        ),
        Chart(
            title="Held-out reward over time",
            x=[time / seconds for time in times],
            series=held_out,
            x_name=unit,
            format=_reward,
        ),
        Chart(
            title="Training reward",
            x=[float(step.step) for step in steps],
            series=training,
            format=_reward,
            x_format=_whole,
        ),
    ]


def _rollout_charts(steps: list[StepRecord], max_staleness: int | None) -> list[Chart]:
    bound = {} if max_staleness is None else {"K": float(max_staleness)}
    lengths = {"mean": "completion_length", "longest": "completion_length_max"}
    groups = {
        "batch": "groups",
        "no signal": "groups_zero_variance",
        "failed": "groups_failed",
        "stale": "groups_stale",
    }
    return [
        _over_steps("Completion length", steps, lengths, unit="tokens", floor=0, format=compact),
        _over_steps(
            "Staleness",
            steps,
            {"mean": "staleness_mean", "max": "staleness_max"},
            unit="versions",
            floor=0,
            ceiling=(max_staleness or 0) + 1,  # so that the bound does not lie on the frame
            lines=bound,
        ),
        _over_steps("Groups", steps, groups, floor=0, format=compact),
    ]


def _update_charts(steps: list[StepRecord], logprob_gap_alarm: float | None) -> list[Chart]:
    gaps = {"mean": "logprob_gap", "largest": "logprob_gap_max"}
    alarm = {} if logprob_gap_alarm is None else {"alarm": logprob_gap_alarm}
    clipped = {"low": "clip_low_share", "high": "clip_high_share"}
    return [
        _over_steps("Log-probability gap", steps, gaps, unit="nats, log scale", lines=alarm, log=True),
        _over_steps("Loss", steps, {"loss": "loss"}),
        _over_steps("Gradient norm", steps, {"gradient norm": "grad_norm"}, floor=0),
        _over_steps("Clipped tokens", steps, clipped, unit="share", floor=0, format=percent),
        _over_steps("KL to the reference", steps, {"KL": "kl"}, unit="nats"),
        *_entropy_chart(steps),
        _over_steps("Learning rate", steps, {"learning rate": "learning_rate"}, floor=0),
    ]


def _entropy_chart(steps: list[StepRecord]) -> list[Chart]:
    """Where a run has had --log_entropy."""
    known = [step for step in steps if step.entropy is not msgspec.UNSET]
    return [_over_steps("Entropy", known, {"entropy": "entropy"}, unit="nats", floor=0)] if known else []


def _time_section(steps: list[StepRecord]) -> str:
    sides = [
        _whole_run("The trainer, all steps", steps, TRAINER),
        _whole_run("The servers, all batches", one_a_batch(steps), SERVERS, BESIDE),
    ]
    charts = "".join(map(render_chart, _time_charts(steps)))
    return f'<section><h2>Time</h2><div class="charts">{"".join(sides)}{charts}</div></section>'


def _time_charts(steps: list[StepRecord]) -> list[Chart]:
    weights = {"stage": "stage_seconds", "commit": "commit_seconds"}
    rewards = {"computing": "reward_seconds", "waited for": "reward_wait_seconds"}
    return [
        _stacked("The trainer, each step", steps, TRAINER),
        _stacked("The servers, each batch", one_a_batch(steps), SERVERS),
        _over_steps(
            "Idle",
            steps,
            {"servers": "generation_idle_share", "trainer": "trainer_idle_share"},
            unit="share of the time",
            floor=0,
            format=percent,
        ),
        _over_steps(
            "Throughput",
            steps,
            {"tokens per second": "tokens_per_second"},
            unit="tokens sampled per second",
            floor=0,
            format=compact,
        ),
        _over_steps("Weights to the servers", steps, weights, unit="log scale", log=True, format=duration),
        _over_steps("Reward functions", steps, rewards, unit="seconds", floor=0),
        _over_steps("Packing", steps, {"seconds": "pack_seconds"}, unit="log scale", log=True, format=duration),
    ]


def _stacked(title: str, steps: list[StepRecord], parts: Parts) -> Chart:
    each = [totals([step], parts) for step in steps]
    return Chart(
        title=title,
        unit="seconds",
        x=[float(step.step) for step in steps],
        series={name: [found[name] for found in each] for name in parts},
        floor=0,
        stacked=True,
        x_format=_whole,
    )


def _whole_run(title: str, steps: list[StepRecord], parts: Parts, beside: Parts | None = None) -> str:
    """Shares as one bar. beside: what goes on at the same time and is told below it."""
    found = totals(steps, parts)
    whole = sum(found.values())
    if not whole:
        return f'<figure><figcaption>{escape(title)}</figcaption><p class="empty">no data</p></figure>'
    bars, legend = [], []
    for index, (name, seconds) in enumerate(found.items()):
        told = f"{name}: {spelled(seconds)}, {percent(seconds / whole)}"
        bars.append(f'<div class="c{index}" style="width:{seconds / whole * 100:.3f}%" title="{escape(told)}"></div>')
        legend.append(f'<span><i class="c{index}"></i>{escape(told)}</span>')
    if beside is not None:
        told = ", ".join(f"{name} {spelled(seconds)}" for name, seconds in totals(steps, beside).items())
        legend.append(f'<span class="note">beside it: {escape(told)}</span>')
    return (
        f'<figure><figcaption>{escape(title)} <span class="unit">{escape(spelled(whole))}</span></figcaption>'
        f'<div class="bar">{"".join(bars)}</div><div class="legend column">{"".join(legend)}</div></figure>'
    )


def _over_steps(title: str, steps: list[StepRecord], fields: dict[str, str], **options: Any) -> Chart:
    series: dict[str, Sequence[float]] = {
        name: [getattr(step, field) for step in steps] for name, field in fields.items()
    }
    return Chart(title=title, x=[float(step.step) for step in steps], series=series, x_format=_whole, **options)


def _tiles(figures: Mapping[str, str]) -> str:
    tiles = [f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in figures.items()]
    return f'<dl class="tiles">{"".join(tiles)}</dl>' if tiles else "<p>The run has not finished a step.</p>"


def _section(title: str, charts: list[Chart]) -> str:
    return f'<section><h2>{escape(title)}</h2><div class="charts">{"".join(map(render_chart, charts))}</div></section>'


def _examples(examples: Sequence[ReportExample]) -> str:
    if not examples:
        return ""
    rows = [
        f"<tr><td><pre>{escape(example.prompt)}</pre></td>"
        f"{_completion(example.before, example.before_reward)}{_completion(example.after, example.after_reward)}</tr>"
        for example in examples
    ]
    return (
        '<section><h2>Held-out completions, before and after</h2><div class="scroll"><table><thead><tr><th>Prompt</th>'
        f"<th>Before</th><th>After</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _completion(text: str | None, reward: float | None) -> str:
    if text is None:
        return '<td class="empty">not sampled</td>'
    score = "" if reward is None else f'<span class="reward">reward {escape(decimal(reward))}</span>'
    return f"<td>{score}<pre>{escape(text)}</pre></td>"


def _configuration(config: Mapping[str, Any]) -> str:
    text = msgspec.yaml.encode(without_secrets(config)).decode()
    return f"<section><details><summary>Resolved configuration</summary><pre>{escape(text)}</pre></details></section>"


def _time_unit(times: Sequence[float]) -> tuple[str, float]:
    """Name and seconds of the unit in which the run's length is a handy number."""
    longest = max(times, default=0.0)
    return ("hours", 3600.0) if longest > 3 * 3600 else ("minutes", 60.0) if longest > 180 else ("seconds", 1.0)


def _figure(value: str | float | int) -> str:
    return value if isinstance(value, str) else compact(value) if isinstance(value, int) else number(value)


def _whole(value: float) -> str:
    """Of a step; ticks between two steps get no label."""
    return f"{value:,.0f}" if value.is_integer() else ""


def _reward(value: float) -> str:
    """Of an axis or a tooltip, where the noise of a difference is not worth digits."""
    return number(round(value, 4))
