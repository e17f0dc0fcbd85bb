"""Seconds of training to 0.80 held-out accuracy: Outrider at several K, and TRL's GRPOTrainer, on the same two cores.

    python bench/learning.py [--seeds 0 1 2] [--bounds 0 1 2 4] [--trl_python PATH] [--plot curves.png]

The task and the start model are the demo's. Every run has the same model, training problems, batch, optimizer (AdamW,
constant learning rate, no weight decay, clipping at 1) and loss (dapo, epsilon 0.2, beta 0, advantages divided by the
group's deviation, one optimizer step a batch), the same reward (exact match) and the same sampling (temperature 1, no
top-k or top-p). Three layouts, one run after the other, seed by seed:

- K = 0, 1, 2, 4: the server on one core, the trainer and its collector on the other, a thread each;
- K = 2 on both cores: every process may run on either core; the server has a single-threaded replica a core, as it
  starts by default, and the trainer one thread;
- TRL: one process with two threads on both cores, sampling with Transformers' ``generate``; where the Python given can
  import trl.

The clock of each runs from the beginning of the first step, before anything is sampled, and never while accuracy is
measured: weights are copied in memory every few steps, and decoded greedily on the held-out problems when the run has
ended, all by the same code. The time at which a curve reaches the target is interpolated between two copies. Prints
tables and, last, one line of JSON; --plot needs matplotlib.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from about import about
from models import DEMO_MODEL
from processes import rollout_server, run, start, two_cores
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from outrider.demo.pretrain import accuracy
from outrider.demo.task import Problem, problems, write_jsonl
from outrider.observe.figures import percent
from outrider.observe.metrics import read_metrics, steps_of
from outrider.observe.parts import SERVERS, TRAINER, shares

HERE = Path(__file__).parent
TARGET = 0.80


class Work(msgspec.Struct, kw_only=True):
    """What every run does. threads: of TRL's process. every: steps between two copies of the weights; file: where they
    are written."""

    model: str
    train: str
    directory: str
    file: str
    prompts: int
    completions: int
    max_completion_length: int
    learning_rate: float
    steps: int
    every: int
    seed: int
    threads: int


class Curve(NamedTuple):
    """One run. points: (seconds, held-out accuracy). step_seconds: the median. trainer, servers: shares of the time."""

    points: list[tuple[float, float]]
    step_seconds: float
    trainer: dict[str, float]
    servers: dict[str, float]


class Judge:
    """Measures the accuracy of weights on held-out problems, decoded greedily."""

    def __init__(self, tasks: Sequence[Problem]) -> None:
        torch.set_num_threads(1)  # the same sums whatever else runs, and no waiting for a thread that has no core
        self.tasks = tasks
        self.tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
        self.model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
        self.start = self.accuracy(dict(self.model.named_parameters()))

    def accuracy(self, weights: dict[str, torch.Tensor]) -> float:
        """Of these weights."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
        return accuracy(self.model, self.tokenizer, self.tasks, sample=False)

    def curve(self, kept: list[dict[str, object]]) -> list[tuple[float, float]]:
        """Seconds and accuracy of the start and of every copy."""
        return [(0.0, self.start), *((copy["seconds"], self.accuracy(copy["weights"])) for copy in kept)]  # type: ignore


def run_outrider(work: Work, bound: int, url: str, cores: list[int], judge: Judge) -> Curve:
    """Train with K = ``bound`` on a running server."""
    flags = {
        "model": work.model,
        "vllm_server_base_url": url,
        "dataset": work.train,
        "reward_funcs": "exact_match",
        "num_generations": work.completions,
        "per_device_train_batch_size": work.prompts * work.completions,
        "max_completion_length": work.max_completion_length,
        "temperature": 1.0,
        "max_staleness": bound,
        "loss_type": "dapo",
        "beta": 0,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "weight_decay": 0,
        "adam_beta2": 0.999,
        "max_steps": work.steps,
        "save_steps": 0,
        "seed": work.seed,
        "threads": 1,
        "panel": "off",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    directory = Path(work.directory)
    run([sys.executable, str(HERE / "trainers.py"), "keep", str(work.every), work.file, *words], cores, directory)
    steps = steps_of(read_metrics(directory / "metrics.jsonl"))
    median = statistics.median(step.seconds for step in steps)
    return Curve(judge.curve(torch.load(work.file)), median, shares(steps, TRAINER), shares(steps, SERVERS))


def run_trl(work: Work, python: str, cores: list[int], judge: Judge) -> Curve:
    """Train with TRL."""
    settings, log = (Path(work.directory).with_suffix(end) for end in (".json", ".log"))
    settings.write_bytes(msgspec.json.encode(work))
    # Its own environment, in which idle threads spin: nothing else wants the cores.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if start([python, str(HERE / "trl_side.py"), str(settings)], cores, log, environment).wait() != 0:
        raise SystemExit(f"TRL failed:\n{log.read_text(errors='replace')[-3000:]}")
    result = torch.load(work.file)
    return Curve(judge.curve(result["kept"]), statistics.median(result["steps"]), {}, {})


def seconds_to(target: float, points: Sequence[tuple[float, float]]) -> float | None:
    """When a curve first reaches ``target``; None if it does not."""
    for (before, low), (after, high) in pairwise(points):
        if high >= target:
            return before + (target - low) / (high - low) * (after - before)
    return None


def has_trl(python: str) -> bool:
    """Whether that Python can import trl."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('trl') is None)"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def speedup(slow: list[Curve], fast: list[Curve]) -> float | None:
    """Median over the seeds of the ratio of times to the target; None where one has not reached it, or was not run."""
    if len(slow) != len(fast):
        return None
    times = [[seconds_to(TARGET, curve.points) for curve in curves] for curves in (slow, fast)]
    ratios = [a / b for a, b in zip(*times, strict=True) if a and b]
    return round(statistics.median(ratios), 3) if len(ratios) == len(slow) > 0 else None


def print_tables(curves: dict[str, list[Curve]], seeds: list[int]) -> None:
    """Times and accuracies of every run, and where the time went on both sides."""
    console = Console(highlight=False, width=140)
    table = Table("", "seed", f"seconds to {TARGET:.2f}", "final accuracy", "training, s", "step, s")
    times = Table("", "trainer", "servers", title="Where the time went, mean of the seeds")
    for kind, runs in curves.items():
        for seed, curve in zip(seeds, runs, strict=True):
            reached = seconds_to(TARGET, curve.points)
            last, final = curve.points[-1]
            shown = "–" if reached is None else f"{reached:.2f}"
            table.add_row(kind, str(seed), shown, f"{final:.3f}", f"{last:.1f}", f"{curve.step_seconds:.3f}")
        if runs[0].trainer:
            times.add_row(kind, *(_told([getattr(run, side) for run in runs]) for side in ("trainer", "servers")))
    console.print(table)
    console.print(times)


def _told(found: list[dict[str, float]]) -> str:
    mean = {name: statistics.mean(run[name] for run in found) for name in found[0]}
    return ", ".join(f"{name} {percent(share)}" for name, share in mean.items() if share >= 0.005)


def plot(curves: dict[str, list[Curve]], path: Path) -> None:
    """Draw all curves."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise SystemExit(f"--plot {path} needs matplotlib, which nothing else here does: {error}") from error
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for colour, (kind, runs) in enumerate(curves.items()):
        for number, curve in enumerate(runs):
            label = kind if number == 0 else None
            axes.plot(*zip(*curve.points, strict=True), color=f"C{colour}", label=label, linewidth=1.3, alpha=0.8)
    axes.axhline(TARGET, color="gray", linewidth=0.8, linestyle="dashed")
    axes.set(xlabel="seconds of training", ylabel="held-out accuracy", ylim=(0.3, 1.0))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@contextlib.contextmanager
def _server(log: Path, cores: Collection[int] | None) -> Iterator[str]:
    """The URL of a server on these cores; none is started where nobody asks it."""
    if cores is None:
        yield ""
        return
    with rollout_server(DEMO_MODEL, log, "--threads", "1", cores=cores) as (_, url):
        yield url


def main() -> None:
    """Run everything, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bounds", type=int, nargs="*", default=[0, 1, 2, 4], help="of a core each")
    parser.add_argument("--trl_python", default=sys.executable)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--every", type=int, default=5, help="steps between two copies of the weights")
    parser.add_argument("--held_out", type=int, default=1000)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    server_core, trainer_core = cores = two_cores()
    trl = has_trl(options.trl_python)
    judge = Judge(problems("heldout", options.held_out, 0))
    curves: dict[str, list[Curve]] = {f"K = {bound}": [] for bound in options.bounds}
    curves["K = 2, both cores"] = []
    if trl:
        curves["TRL"] = []
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        write_jsonl(place / "train.jsonl", problems("train", 7000, 0))
        with (
            _server(place / "pinned.log", [server_core] if options.bounds else None) as pinned,
            _server(place / "free.log", cores) as free,
        ):
            for seed in options.seeds:
                for kind, runs in curves.items():
                    work = Work(
                        model=str(DEMO_MODEL),
                        train=str(place / "train.jsonl"),
                        directory=str(place / f"{kind}, seed {seed}"),
                        file=str(place / f"{kind}, seed {seed}.pt"),
                        prompts=options.prompts,
                        completions=options.completions,
                        max_completion_length=8,
                        learning_rate=options.learning_rate,
                        steps=options.steps,
                        every=options.every,
                        seed=seed,
                        threads=2,
                    )
                    if kind == "TRL":
                        runs.append(run_trl(work, options.trl_python, list(cores), judge))
                    elif kind == "K = 2, both cores":
                        runs.append(run_outrider(work, 2, free, list(cores), judge))
                    else:
                        runs.append(run_outrider(work, int(kind.split()[-1]), pinned, [trainer_core], judge))
                    reached = seconds_to(TARGET, runs[-1].points)
                    print(f"{kind}, seed {seed}: {reached}, {runs[-1].points[-1]}", file=sys.stderr, flush=True)
    print_tables(curves, options.seeds)
    if options.plot is not None:
        plot(curves, options.plot)
    both = curves["K = 2, both cores"]
    summary = {
        "speedup_k2_over_k0": speedup(curves.get("K = 0", []), curves.get("K = 2", [])),
        "speedup_over_trl": speedup(curves["TRL"], both) if trl else None,
        "seconds_to_target": {
            kind: [seconds_to(TARGET, curve.points) for curve in runs] for kind, runs in curves.items()
        },
        "final_accuracy": {kind: [curve.points[-1][1] for curve in runs] for kind, runs in curves.items()},
        "step_seconds": {
            kind: statistics.median(curve.step_seconds for curve in runs) for kind, runs in curves.items()
        },
    }
    print(json.dumps({**summary, **about()}))


if __name__ == "__main__":
    main()
