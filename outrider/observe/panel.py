"""What a person sees of a running job: a live panel on a terminal, plain lines anywhere else."""

import time
from collections import deque
from typing import Protocol

from rich.console import Console
from rich.text import Text

from outrider.contract.feed import PoolStatus
from outrider.contract.output import drop_output
from outrider.observe.config import LoggingConfig
from outrider.observe.figures import compact, decimal, duration, mean, number, percent
from outrider.observe.live_panel import RECENT, LivePanel
from outrider.observe.parts import sampling_rate
from outrider.observe.printable import printable
from outrider.observe.records import EvalRecord, StepRecord
from outrider.observe.watch import Watch


class Panel(Protocol):
    """Where the trainer tells what happens. Calls between ``start`` and ``stop``, from one thread."""

    def start(self) -> None:
        """Begin to show."""

    def step(self, record: StepRecord) -> None:
        """An optimizer step is done."""

    def evaluation(self, record: EvalRecord) -> None:
        """An evaluation is done."""

    def pool(self, status: PoolStatus) -> None:
        """What the collector does right now."""

    def phase(self, text: str) -> None:
        """What the trainer does from now on: ``training``, ``waiting for rollouts``, ``saving``."""

    def notice(self, text: str) -> None:
        """Something worth a line with the time of day."""

    def example(self, prompt: str, completion: str, reward: float) -> None:
        """A rollout of the latest step; shown with ``--log_completions true`` alone."""

    def stop(self) -> None:
        """Show the last state and give the terminal back."""


def make_panel(
    config: LoggingConfig, title: str, max_steps: int, max_staleness: int, console: Console | None = None
) -> Panel:
    """The panel that ``--panel`` asks for. console: where to write; by default standard output."""
    console = console or LastingConsole(force_terminal=True if config.panel == "on" else None, highlight=False)
    if config.panel == "on" or (config.panel == "auto" and console.is_terminal and not console.is_dumb_terminal):
        return LivePanel(config, title, max_steps, max_staleness, console)
    return PlainPanel(config, title, max_steps, max_staleness, console)


class LastingConsole(Console):
    """Standard output, whose reader may leave: the run goes on without."""

    def on_broken_pipe(self) -> None:
        """Called by rich, whose own way is to exit."""
        self.quiet = True
        drop_output()


class PlainPanel:
    """One line every ``--logging_steps`` steps, and one for each evaluation and notice; for files and pipes."""

    def __init__(self, config: LoggingConfig, title: str, max_steps: int, max_staleness: int, console: Console) -> None:
        self._config = config
        self._title = title
        self._max_steps = max_steps
        self._max_staleness = max_staleness
        self._console = console
        self._watch = Watch(config.logprob_gap_alarm)
        self._recent: deque[StepRecord] = deque(maxlen=RECENT)

    def start(self) -> None:
        """Name the run."""
        self._line(f"outrider: {self._title}, {self._max_steps:,} steps, max staleness {self._max_staleness}")

    def step(self, record: StepRecord) -> None:
        """Print the step if it is one of ``--logging_steps`` or the last."""
        self._recent.append(record)
        if record.step % self._config.logging_steps == 0 or record.step == record.max_steps:
            self._line(self._describe(record))
        for text in self._watch.step(record):
            self.notice(text)

    def evaluation(self, record: EvalRecord) -> None:
        """Print the held-out reward."""
        failed = f", {record.failed} failed" if record.failed else ""
        self._line(
            f"evaluation after step {record.step}: held-out reward {decimal(record.reward)} "
            f"({record.count} completions{failed}, {number(record.completion_length)} tokens, "
            f"{duration(record.seconds)})"
        )

    def pool(self, status: PoolStatus) -> None:
        """Nothing: the collector says twice a second what it does."""

    def phase(self, text: str) -> None:
        """Nothing: phases change several times a step."""

    def notice(self, text: str) -> None:
        """Print it with the time of day."""
        self._line(f"{time.strftime('%H:%M:%S')} {text}")

    def example(self, prompt: str, completion: str, reward: float) -> None:
        """Print prompt and completion, with ``--log_completions true``."""
        if self._config.log_completions:
            self._line(f"rollout with reward {decimal(reward)}\n  prompt: {prompt}\n  completion: {completion}")

    def stop(self) -> None:
        """Nothing is open."""

    def _describe(self, record: StepRecord) -> str:
        alarm = " (!)" if record.logprob_gap > self._config.logprob_gap_alarm else ""
        remaining = mean(step.seconds for step in self._recent) * max(record.max_steps - record.step, 0)
        return "  ".join(
            (
                f"step {record.step}/{record.max_steps}",
                f"reward {decimal(record.reward)}",
                f"length {number(record.completion_length)}",
                f"stale {number(record.staleness_mean)}/{record.staleness_max}",
                f"loss {number(record.loss)}",
                f"grad {number(record.grad_norm)}",
                f"gap {number(record.logprob_gap)}{alarm}",
                f"idle gen {percent(record.generation_idle_share)} train {percent(record.trainer_idle_share)}",
                f"{compact(sampling_rate(self._recent))} tok/s",
                duration(record.seconds),
                f"eta {duration(remaining)}",
            )
        )

    def _line(self, text: str) -> None:
        # Text, not markup: brackets in a notice or a completion are no styles. Never wrapped: lines are grepped.
        self._console.print(Text(printable(text)), soft_wrap=True)
        self._console.file.flush()
