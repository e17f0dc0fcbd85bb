"""``outrider show``: what a run has sampled, and how far it has come."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.text import Text

from outrider.collector.ledger import read_rollouts, trained_steps
from outrider.contract.errors import UserError
from outrider.observe.figures import decimal, spelled
from outrider.observe.metrics import evaluations_of, read_metrics, steps_of
from outrider.observe.records import MetricsRow
from outrider.observe.rollouts import render_rollouts


def main(argv: list[str]) -> int:
    """Print a run's summary and some rollouts of one step; returns the exit status. Raises UserError."""
    arguments = _parser().parse_args(argv)
    run = Path(arguments.run)
    ledger, metrics = run / "ledger.sqlite", run / "metrics.jsonl"
    if not ledger.is_file():
        raise UserError(
            f"{run} is {'no directory' if not run.is_dir() else 'not a run: it has no ledger.sqlite'}. "
            "Give the --output_dir of a run"
        )
    console = Console(highlight=False)
    rows = read_metrics(metrics) if metrics.is_file() else []
    if rows:
        console.print(Text(describe_run(rows)))
    batches = batches_of(rows, trained_steps(ledger))
    step = choose_step(run, list(batches), arguments.step)
    batch = batches[step]
    console.print(Text(f"\nStep {step}" if batch == step else f"\nStep {step}, on batch {batch}", style="bold"))
    rollouts = read_rollouts(ledger, batch)
    console.print(
        render_rollouts(
            rollouts, best=arguments.best, worst=arguments.worst, random=arguments.random, seed=arguments.seed
        )
    )
    return 0


def batches_of(rows: list[MetricsRow], known: list[int]) -> dict[int, int]:
    """Steps that were taken, and for each the batch, counted from 1, that it was taken on. known: to the ledger."""
    batches = {row.step: row.version + 1 for row in steps_of(rows)}
    return {step: batch for step, batch in batches.items() if batch in known}


def choose_step(run: Path, trained: list[int], wanted: int | None) -> int:
    """``wanted``, or the newest of the trained steps; UserError if there is no such step."""
    if not trained:
        raise UserError(f"{run} has not trained a step yet. Try again when it has")
    if wanted is None:
        return max(trained)
    if wanted not in trained:
        nearest = min(trained, key=lambda step: (abs(step - wanted), step))
        raise UserError(
            f"--step {wanted}: {run} has rollouts of the steps {min(trained)} to {max(trained)}; "
            f"the nearest is --step {nearest}"
        )
    return wanted


def describe_run(rows: list[MetricsRow]) -> str:
    """One paragraph: steps, time, rewards."""
    steps, evaluations = steps_of(rows), evaluations_of(rows)
    if not steps:
        return "No step has been trained yet."
    first, last = steps[0], steps[-1]
    text = (
        f"{last.step:,} of {last.max_steps:,} steps in {spelled(last.time)}. Training reward "
        f"{decimal(first.reward)} at step {first.step:,}, {decimal(last.reward)} at step {last.step:,}."
    )
    if evaluations:
        newest = evaluations[-1]
        text += f" Held-out reward {decimal(newest.reward)} after step {newest.step:,}"
        text += f", {decimal(evaluations[0].reward)} after step {evaluations[0].step:,}." if evaluations[1:] else "."
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="outrider show", description="Show a run's progress, and the best, worst and random rollouts of a step."
    )
    parser.add_argument("run", metavar="RUN", help="the --output_dir of a run, which may still be going on")
    parser.add_argument("--step", type=int, help="the step whose rollouts to show (default: the newest trained)")
    parser.add_argument("--best", type=_count, default=2, help="how many with the highest reward (default: 2)")
    parser.add_argument("--worst", type=_count, default=2, help="how many with the lowest reward (default: 2)")
    parser.add_argument("--random", type=_count, default=2, help="how many of the others (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choice (default: 0)")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative; give 0 for none")
    return value
