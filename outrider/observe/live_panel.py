"""The live terminal panel: six cards that grow with the terminal."""

import math
import textwrap
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from rich.box import ROUNDED
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel as Card
from rich.table import Table
from rich.text import Text

from outrider.contract.feed import PoolStatus
from outrider.observe.config import LoggingConfig
from outrider.observe.figures import compact, decimal, duration, mean, number, percent, trend
from outrider.observe.parts import SERVERS, TRAINER, Parts, one_a_batch, sampling_rate, shares
from outrider.observe.printable import printable
from outrider.observe.records import EvalRecord, StepRecord
from outrider.observe.sparkline import bar, sparkline, stacked
from outrider.observe.watch import Watch

#: One line of a card: what it is, and its value.
Row: TypeAlias = tuple[str, Text]

_REFRESH_HZ = 2  # as often as the collector sends its status; a rendering takes a few milliseconds
_LABEL = 13  # width of the left column
_KEPT_NOTICES = 50
_FRAME = 4  # columns that a card's border and padding take
RECENT = 20  # steps that figures of the present are means of

#: Colours of where time goes: work, then waiting, then the rest.
_PART_STYLES = {
    "train": "green",
    "generate": "green",
    "wait": "yellow",
    "idle": "yellow",
    "wait for rewards": "magenta",
    "collate": "cyan",
    "publish": "magenta",
    "save": "blue",
    "down": "red",
    "other": "bright_black",
}


class LivePanel:
    """Redraws the state of the run in place, twice a second, from a thread of its own.

    It needs 80 columns and 24 lines; what a taller terminal has more goes to the reward curve, to further lines of
    the cards, and to notices.
    """

    def __init__(self, config: LoggingConfig, title: str, max_steps: int, max_staleness: int, console: Console) -> None:
        self._config = config
        self._title = title
        self._max_steps = max_steps
        self._max_staleness = max_staleness
        self._console = console
        self._watch = Watch(config.logprob_gap_alarm)
        self._lock = threading.Lock()  # the rendering thread reads what the trainer's thread writes
        self._live: Live | None = None
        self._started = time.monotonic()
        self._stepped = self._started
        self._phase = "starting"
        self._rewards: list[float] = []
        self._held_out: list[float] = []
        self._recent: deque[StepRecord] = deque(maxlen=RECENT)
        self._step: StepRecord | None = None
        self._evaluation: EvalRecord | None = None
        self._pool: PoolStatus | None = None
        self._example: tuple[str, str, float] | None = None
        self._notices: list[tuple[str, str]] = []

    def start(self) -> None:
        """Begin to draw, below what the terminal holds already."""
        self._started = self._stepped = time.monotonic()
        self._live = Live(
            get_renderable=self.render, console=self._console, refresh_per_second=_REFRESH_HZ, vertical_overflow="crop"
        )
        self._live.start()

    def stop(self) -> None:
        """Draw the last state, which stays on the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def step(self, record: StepRecord) -> None:
        """Take up an optimizer step."""
        with self._lock:
            self._step = record
            self._stepped = time.monotonic()
            self._rewards.append(record.reward)
            self._recent.append(record)
        for text in self._watch.step(record):
            self.notice(text)

    def evaluation(self, record: EvalRecord) -> None:
        """Take up an evaluation."""
        with self._lock:
            self._evaluation = record
            self._held_out.append(record.reward)

    def pool(self, status: PoolStatus) -> None:
        """Take up what the collector does."""
        with self._lock:
            self._pool = status

    def phase(self, text: str) -> None:
        """Take up what the trainer does."""
        with self._lock:
            self._phase = text

    def notice(self, text: str) -> None:
        """Show a line with the time of day, until later ones have pushed it out."""
        with self._lock:
            self._notices = [*self._notices[1 - _KEPT_NOTICES :], (time.strftime("%H:%M:%S"), text)]

    def example(self, prompt: str, completion: str, reward: float) -> None:
        """Take up a rollout to show with ``--log_completions true``."""
        with self._lock:
            self._example = (prompt, completion, reward)

    def render(self) -> RenderableType:
        """The panel at this moment, at most as high as the terminal less one line."""
        with self._lock:
            return self._render()

    def _render(self) -> RenderableType:
        # 23 lines are the header, two rows of cards with 4 lines each, and two lines each of time and of notices.
        width, spare = self._console.width, max(self._console.height - 1 - 23, 0)
        shows_example = self._config.log_completions and self._example is not None and spare >= 7
        spare -= 7 if shows_example else 0
        notices = 2 + min(spare, 2)
        upper = 4 + min(max(spare - 2, 0), 5)
        lower = 4 + min(max(spare - 7, 0) // 2, 3)
        notices += min(max(spare - 7 - (lower - 4), 0), 6)
        half = width // 2 - _FRAME
        parts: list[RenderableType] = [
            self._header(width),
            _pair(
                _card("Reward", self._reward_lines(half, upper), upper),
                _card("Flow", _lines(self._flow_rows(), upper), upper, "cyan"),
            ),
            _card("Time", self._time_lines(width - _FRAME), 2, "green"),
            _pair(
                _card("Update", _lines(self._update_rows(), lower), lower, "magenta"),
                _card("Rollouts", _lines(self._pool_rows(half), lower), lower, "blue"),
            ),
        ]
        if shows_example:
            parts.append(_card("A rollout", self._example_lines(), 5, "blue"))
        parts.append(_card("Notices", self._notice_lines(width - _FRAME, notices), notices, "yellow"))
        return Group(*parts)

    def _header(self, width: int) -> RenderableType:
        step = self._step.step if self._step else 0
        share = step / self._max_steps if self._max_steps > 0 else math.nan
        elapsed = time.monotonic() - self._started
        figures = Text.assemble(
            (f"{step:,}", "bold"),
            f"/{self._max_steps:,}  {percent(share)}  ",
            (duration(elapsed), "dim"),
            ("  eta ", "dim"),
            (self._eta(step), "bold"),
        )
        full, empty = bar(share, max(width - _FRAME - figures.cell_len - 2, 4))
        return Card(
            Text.assemble((full, "bold green"), (empty, "bright_black"), "  ", figures, no_wrap=True),
            title=Text.assemble(("outrider", "bold green"), f"  {self._title}"),
            title_align="left",
            subtitle=Text(self._phase, style="bold"),
            subtitle_align="right",
            border_style="green",
            box=ROUNDED,
            height=3,
        )

    def _eta(self, step: int) -> str:
        if not self._recent:
            return "?"
        left = mean(record.seconds for record in self._recent) * max(self._max_steps - step, 0)
        return duration(max(left - (time.monotonic() - self._stepped), 0.0) if step < self._max_steps else 0.0)

    def _reward_lines(self, width: int, height: int) -> list[RenderableType]:
        record = self._step
        if record is None:
            return _lines([("training", Text("no step yet", style="dim")), self._held_out_row(width)], height)
        spread = (f" ±{decimal(record.reward_std)}  ", "dim")
        training = Text.assemble((decimal(record.reward), "bold"), spread, _arrow(trend(self._rewards)))
        rows = [("training", training), self._held_out_row(width)]
        parts = [(f"  {name}", Text(decimal(value))) for name, value in record.rewards.items()]
        rows += parts[: max(height - 5, 0)] if len(parts) > 1 else []
        curve = sparkline(self._rewards, width, height - len(rows))
        drawn = [Text(line, style="green", no_wrap=True) for line in curve]
        return [*_lines(rows[:1], 1), *drawn, *_lines(rows[1:], height)]

    def _held_out_row(self, width: int) -> Row:
        record = self._evaluation
        if record is None:
            return "held-out", Text("not evaluated yet", style="dim")
        version = f"{record.version_min}" + (
            f"–{record.version_max}" if record.version_max != record.version_min else ""
        )
        text = Text.assemble((decimal(record.reward), "bold"), (f" version {version}  ", "dim"))
        room = width - _LABEL - text.cell_len
        text.append("".join(sparkline(self._held_out, room)) if room > 0 and len(self._held_out) > 1 else "", "green")
        return "held-out", text

    def _flow_rows(self) -> list[Row]:
        record = self._step
        if record is None:
            return [("", Text("waiting for the first batch", style="dim"))]
        longest = f"max {compact(record.completion_length_max)}"
        over = record.staleness_max > self._max_staleness
        oldest = Text(f"max {record.staleness_max}", "bold red" if over else "")
        rewards = f"{duration(record.reward_seconds)} computing"
        # Not every step has a server that takes a version meanwhile.
        stage = next((step.stage_seconds for step in reversed(self._recent) if step.stage_seconds), 0.0)
        commit = next((step.commit_seconds for step in reversed(self._recent) if step.commit_seconds), 0.0)
        return [
            ("length", _joined(number(record.completion_length), longest, f"{percent(record.truncated_share)} cut")),
            ("staleness", _joined(number(record.staleness_mean), oldest, f"K {self._max_staleness}")),
            ("tokens/s", Text(compact(sampling_rate(self._recent)), style="bold")),
            ("step", _joined(duration(record.seconds), f"train {duration(record.train_seconds)}")),
            ("  batch", _joined(duration(record.batch_seconds), f"pack {duration(record.pack_seconds)}")),
            ("rewards", _joined(rewards, f"waited {duration(record.reward_wait_seconds)}")),
            ("weights", _joined(f"stage {duration(stage)}", f"commit {duration(commit)}")),
            ("  copying", Text(f"{duration(record.publish_wait_seconds)} waited")),
            ("saving", Text(f"{duration(record.save_seconds)} waited")),
        ]

    def _time_lines(self, width: int) -> list[RenderableType]:
        """Where the time of the latest steps went: the trainer's, and that of the servers over the same batches."""
        return [
            self._time_line("trainer", self._recent, TRAINER, width),
            self._time_line("servers", one_a_batch(self._recent), SERVERS, width),
        ]

    def _time_line(self, side: str, records: Iterable[StepRecord], parts: Parts, width: int) -> RenderableType:
        found = shares(records, parts)
        line = Text(f"{side:<9}", style="dim", no_wrap=True, overflow="ellipsis")
        length = max(min(width // 3, 50), 8)
        for name, cells in zip(found, stacked(list(found.values()), length), strict=True):
            line.append("━" * cells, f"not dim {_PART_STYLES[name]}")
        line.append("─" * (length + 9 - line.cell_len), "bright_black")
        for name, share in sorted(found.items(), key=lambda item: -item[1]):
            told = f"  {name} ", percent(share)
            if share >= 0.005 and line.cell_len + len("".join(told)) <= width:
                line.append(told[0], f"not dim {_PART_STYLES[name]}").append(told[1], "not dim")
        return line

    def _update_rows(self) -> list[Row]:
        record = self._step
        if record is None:
            return [("", Text("no step yet", style="dim"))]
        alarm = record.logprob_gap > self._config.logprob_gap_alarm or math.isnan(record.logprob_gap)
        gap = Text(number(record.logprob_gap), "bold red" if alarm else "")
        return [
            ("loss", _value(record.loss)),
            ("grad norm", _value(record.grad_norm)),
            ("log-prob gap", _joined(gap, f"max {number(record.logprob_gap_max)}")),
            ("lr", _joined(number(record.learning_rate), f"KL {number(record.kl)}")),
            ("clipped", _joined(f"{percent(record.clip_low_share)} low", f"{percent(record.clip_high_share)} high")),
            ("correction", Text(number(record.correction_mean))),
            ("epoch", Text(number(record.epoch))),
        ]

    def _pool_rows(self, width: int) -> list[Row]:
        record, pool = self._step, self._pool
        rows: list[Row] = []
        if pool is None:
            rows.append(("servers", Text("not heard of yet", style="dim")))
        else:
            alive = f"{pool.servers_alive}/{pool.servers_total}"
            text = Text(alive, "bold red" if pool.servers_alive < pool.servers_total else "bold")
            text.append(f" at {_versions(pool.server_versions, width - _LABEL - len(alive) - 4)}", "not bold default")
            rows += [
                ("servers", text),
                (
                    "running",
                    _joined(f"{pool.rollouts_running:,} rollouts", f"idle {percent(pool.generation_idle_share)}"),
                ),
                ("groups", _joined(f"{pool.groups_running:,} running", f"{pool.groups_finished:,} ready")),
            ]
        if record is not None:
            rows += [
                ("trained", _joined(f"{record.groups:,}", f"{record.groups_zero_variance:,} no signal")),
                ("lost", _joined(f"{record.groups_failed:,} failed", f"{record.groups_stale:,} stale")),
                ("generating", Text(f"{compact(pool.tokens_per_second if pool else math.nan)} tokens/s")),
                ("prompts", Text(f"{record.prompts_rejected:,} rejected")),
            ]
        return rows

    def _example_lines(self) -> list[RenderableType]:
        assert self._example is not None
        prompt, completion, reward = self._example
        lines = [
            Text.assemble(("prompt      ", "dim"), _one_line(prompt), no_wrap=True, overflow="ellipsis"),
            Text.assemble(("reward      ", "dim"), (decimal(reward), "bold")),
        ]
        return [*lines, Text.assemble(("completion  ", "dim"), _one_line(completion))]

    def _notice_lines(self, width: int, height: int) -> list[RenderableType]:
        lines: list[Text] = []
        for clock, text in self._notices[-height:]:
            wrapped = textwrap.wrap(_one_line(text), max(width - 10, 10)) or [""]
            lines += [Text.assemble((f"{clock}  ", "dim"), wrapped[0], no_wrap=True)]
            lines += [Text(f"{'':10}{line}", no_wrap=True) for line in wrapped[1:]]
        return list(lines[-height:])


def _pair(left: RenderableType, right: RenderableType) -> RenderableType:
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(left, right)
    return grid


def _card(title: str, lines: Sequence[RenderableType], height: int, style: str = "green") -> RenderableType:
    return Card(
        Group(*lines),
        title=Text(title, style="bold"),
        title_align="left",
        border_style=style,
        box=ROUNDED,
        height=height + 2,
    )


def _lines(rows: Sequence[Row], height: int) -> list[RenderableType]:
    """The first ``height`` rows, label and value, each cut at the card's edge."""
    return [
        Text.assemble((f"{label[: _LABEL - 1]:<{_LABEL}}", "dim"), value, no_wrap=True, overflow="ellipsis")
        for label, value in rows[:height]
    ]


def _joined(*parts: str | Text) -> Text:
    text = Text()
    for part in parts:
        text.append(" · " if text else "", "dim").append(part)
    return text


def _arrow(change: float) -> Text:
    if not math.isfinite(change):
        return Text("")
    if abs(change) < 5e-4:
        return Text("▶ steady", style="dim")
    return Text(f"{'▲' if change > 0 else '▼'} {change:+.3f}", style="green" if change > 0 else "yellow")


def _value(value: float) -> Text:
    return Text(number(value), style="" if math.isfinite(value) else "bold red")


def _versions(versions: Sequence[int], width: int) -> str:
    """Every server's version where they fit, else how many servers have which: ``137 ×6, 136 ×2``."""
    each = " ".join(str(version) for version in versions)
    if len(each) <= width:
        return each or "–"
    counts = {version: versions.count(version) for version in sorted(set(versions), reverse=True)}
    return ", ".join(f"{version} ×{count}" for version, count in counts.items())


def _one_line(text: str) -> str:
    # The head is plenty for any terminal, and a completion may have a hundred thousand characters.
    return printable(" ".join(text[:4000].split()))
