"""The rollouts of one step for a person to read."""

import math
import random
from collections.abc import Sequence

from rich.box import ROUNDED
from rich.console import Group, RenderableType
from rich.panel import Panel as Card
from rich.table import Table
from rich.text import Text

from outrider.contract.rollouts import RolloutRow
from outrider.observe.figures import decimal, mean
from outrider.observe.printable import printable

_STYLES = {"best": "green", "worst": "red", "random": "blue"}


def render_rollouts(
    rows: Sequence[RolloutRow], *, best: int = 2, worst: int = 2, random: int = 2, seed: int = 0
) -> RenderableType:
    """The best and the worst rollouts by reward, and some of the others drawn with ``seed``, each shown once.

    Prompt and completion are printed whole, control characters as pictures.
    """
    groups = len({row.group for row in rows})
    heading = Text.assemble(
        (f"{len(rows):,} rollout{'s' * (len(rows) != 1)}", "bold"),
        f" of {groups:,} group{'s' * (groups != 1)}, mean reward ",
        (decimal(mean(row.reward for row in rows if row.reward is not None)), "bold"),
    )
    picked = pick_rollouts(rows, best=best, worst=worst, random=random, seed=seed)
    return Group(heading, *(_card(kind, row) for kind, row in picked))


def pick_rollouts(
    rows: Sequence[RolloutRow], *, best: int, worst: int, random: int, seed: int
) -> list[tuple[str, RolloutRow]]:
    """What ``render_rollouts`` shows, as (``best`` | ``worst`` | ``random``, rollout). Without a reward: never best."""
    ranked = sorted(rows, key=lambda row: (-_rank(row), row.group, row.index))
    top, rest = ranked[: max(best, 0)], ranked[max(best, 0) :]
    cut = len(rest) - min(max(worst, 0), len(rest))
    middle, bottom = rest[:cut], rest[cut:]
    kinds = (("best", top), ("worst", bottom[::-1]), ("random", _draw(middle, random, seed)))
    return [(kind, row) for kind, chosen in kinds for row in chosen]


def staleness(row: RolloutRow) -> int | None:
    """Versions between the sampling of the oldest token and its training; None if the rollout was not trained."""
    # Batch b makes version b, so it trains version b - 1.
    return None if row.step is None or not row.versions else row.step - 1 - min(version for version, _ in row.versions)


def _draw(rows: Sequence[RolloutRow], count: int, seed: int) -> list[RolloutRow]:
    return random.Random(seed).sample(rows, min(max(count, 0), len(rows)))


def _rank(row: RolloutRow) -> float:
    return -math.inf if row.reward is None or math.isnan(row.reward) else row.reward


def _card(kind: str, row: RolloutRow) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("prompt", Text(printable(row.prompt)))
    table.add_row("completion", Text(printable(row.completion), style="bold"))
    table.add_row("reward", Text("  ".join([_reward(row.reward), *_functions(row)])))
    table.add_row("advantage", Text(_reward(row.advantage)))
    table.add_row("tokens", Text(f"{row.tokens:,}, ended by {row.finish_reason}"))
    table.add_row("versions", Text(_versions(row)))
    table.add_row("server", Text(row.server))
    if row.state != "trained":
        table.add_row("state", Text(f"{row.state}: {row.reason}" if row.reason else row.state, style="yellow"))
    title = Text.assemble((kind, "bold"), f"  group {row.group}, rollout {row.index}")
    return Card(table, title=title, title_align="left", border_style=_STYLES[kind], box=ROUNDED)


def _reward(value: float | None) -> str:
    return "none" if value is None else decimal(value)


def _functions(row: RolloutRow) -> list[str]:
    return [f"{name} {_reward(value)}" for name, value in row.rewards.items()]


def _versions(row: RolloutRow) -> str:
    spans = ", ".join(f"{version} ×{count:,}" for version, count in row.versions) or "none"
    age = staleness(row)
    return spans if age is None else f"{spans}; staleness {age}"
