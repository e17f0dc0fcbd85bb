"""How much of the time generation and training overlap: the longer of the two alone / a measured step.

    python bench/overlap.py [--rounds 3] [--steps 18] [--new_tokens 128] [--silent 0.625]

The server has one core and one thread. The trainer has the other core and one thread, and shares it with the collector
and the reward worker, which it starts. Each round measures four things in turn:

- generate: seconds of a batch where the trainer takes batches and publishes weights, and computes no gradients (K = 2);
- K = 2 and K = 0: seconds of a step of the whole;
- train: seconds of a step where the trainer trains the batches of that K = 2 run from memory, publishes them, and
  nothing else runs.

A share of the groups (--silent) has no signal and is generated but not trained, as in any GRPO run; it also balances
the two sides, since training a token takes three times the operations of sampling it.

All four are wall clock over a window of steps divided by their number, from the trainer's own records; the steps at the
beginning, when caches fill, and at the end, when nothing is left to generate, are outside the window. Nothing is
subtracted. Prints tables and, last, one line of JSON.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from about import about
from models import save_bench_model
from processes import cpu_of_a_step, rollout_server, run, two_cores
from rich.console import Console
from rich.table import Table

from outrider.observe.figures import percent
from outrider.observe.metrics import read_metrics, steps_of
from outrider.observe.parts import SERVERS, TRAINER, shares
from outrider.observe.records import StepRecord

HERE = Path(__file__).parent
#: With K = 2 three batches begin at once, and where nothing slows them down they go on ending at once: a window that
#: is not whole multiples of that long would count parts of a burst.
BURST = 3
WARM_UP, WIND_DOWN = 2 * BURST, BURST
KINDS = ("generate", "K = 2", "K = 0", "train")


class Side(NamedTuple):
    """One measurement. cpu: CPU seconds of a step, by process."""

    seconds: float
    cpu: dict[str, float]
    steps: list[StepRecord]


def measure(directory: Path, command: list[str], core: int, server: int) -> Side:
    """Run a trainer, and look at the steps inside the window."""
    samples = run(command, [core], directory, server)
    steps = steps_of(read_metrics(directory / "metrics.jsonl"))
    window = steps[WARM_UP:-WIND_DOWN]
    seconds = (window[-1].time - steps[WARM_UP - 1].time) / len(window)
    return Side(seconds, cpu_of_a_step(samples, WARM_UP, WARM_UP + len(window)), window)


def write_prompts(path: Path, count: int, tokens: int, silent: float) -> None:
    """Random digits: a token of the demo's tokenizer each. silent: share of prompts whose rewards are all alike, spread
    evenly, so that batches are alike."""
    source = random.Random(0)
    rows = [
        {
            "prompt": "".join(source.choices("0123456789", k=tokens)),
            "signal": int((index + 1) * silent) == int(index * silent),
        }
        for index in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def one_round(place: Path, options: argparse.Namespace, url: str, server: int, core: int) -> dict[str, Side]:
    """The four measurements."""
    rollouts = options.prompts * options.completions
    flags = {
        "model": place.parent / "model",
        "vllm_server_base_url": url,
        "dataset": place.parent / "prompts.jsonl",
        "dataset_shuffle": "false",
        "reward_funcs": f"{HERE / 'rewards.py'}:varied",
        "num_generations": options.completions,
        "per_device_train_batch_size": rollouts // options.micro_batches,
        "gradient_accumulation_steps": options.micro_batches,
        "max_completion_length": options.new_tokens,
        "temperature": 1.0,
        "loss_type": "dapo",
        "beta": 0,
        "learning_rate": 1e-6,
        "max_steps": options.steps + WARM_UP + WIND_DOWN,
        "save_steps": 0,
        "threads": 1,
        "panel": "off",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    ours = [sys.executable, "-m", "outrider.cli.main", "train", *words]
    part = [sys.executable, str(HERE / "trainers.py")]
    place.mkdir()
    return {
        "generate": measure(place / "generate", [*part, "consume", *words, "--max_staleness", "2"], core, server),
        "K = 2": measure(place / "k2", [*ours, "--max_staleness", "2"], core, server),
        "K = 0": measure(place / "k0", [*ours, "--max_staleness", "0"], core, server),
        "train": measure(
            place / "train",
            [*part, "replay", str(place / "k2" / "ledger.sqlite"), *words, "--max_staleness", "2"],
            core,
            server,
        ),
    }


def print_seconds(rounds: list[dict[str, Side]]) -> None:
    """Seconds and efficiencies of every round."""
    table = Table("round", *(f"{kind}, s" for kind in KINDS), "efficiency K = 2", "efficiency K = 0")
    for number, sides in enumerate(rounds, 1):
        seconds = {kind: sides[kind].seconds for kind in KINDS}
        alone = max(seconds["generate"], seconds["train"])
        table.add_row(
            str(number),
            *(f"{seconds[kind]:.3f}" for kind in KINDS),
            *(f"{alone / seconds[kind]:.3f}" for kind in ("K = 2", "K = 0")),
        )
    Console(highlight=False).print(table)


def print_shares(rounds: list[dict[str, Side]]) -> None:
    """Where the wall clock of both sides went, and which processes used the cores."""
    table = Table("", "trainer", "servers", "CPU seconds of a step", title="All rounds")
    for kind in KINDS:
        steps = [step for sides in rounds for step in sides[kind].steps]
        cpu = {
            name: statistics.mean(sides[kind].cpu.get(name, 0.0) for sides in rounds) for name in rounds[0][kind].cpu
        }
        table.add_row(
            kind,
            _told(shares(steps, TRAINER)),
            "–" if kind == "train" else _told(shares(steps, SERVERS)),
            ", ".join(f"{name} {seconds:.3f}" for name, seconds in cpu.items()),
        )
    Console(highlight=False, width=160).print(table)
    print("collector and reward workers run on the trainer's core; others is what the machine did besides")


def _told(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {percent(share)}" for name, share in found.items() if share >= 0.005)


def main() -> None:
    """Measure, round by round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=18, help=f"steps of the window, a multiple of {BURST}")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--prompt_tokens", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--silent", type=float, default=0.625, help="share of groups whose rewards are all alike")
    parser.add_argument("--micro_batches", type=int, default=4)
    options = parser.parse_args()
    if options.steps % BURST:
        parser.error(f"--steps {options.steps} is not a multiple of {BURST}")
    server_core, trainer_core = two_cores()
    rounds = []
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        model = save_bench_model(place / "model")
        write_prompts(place / "prompts.jsonl", 4096, options.prompt_tokens, options.silent)
        flags = ("--threads", "1", "--data_parallel_size", "1")
        with rollout_server(model, place / "server.log", *flags, cores=[server_core]) as (server, url):
            for number in range(options.rounds):
                rounds.append(one_round(place / f"round-{number}", options, url, server, trainer_core))
                seconds = {kind: round(side.seconds, 3) for kind, side in rounds[-1].items()}
                print(f"round {number + 1}: {seconds}", file=sys.stderr, flush=True)
    print_seconds(rounds)
    print_shares(rounds)
    median = {kind: statistics.median(sides[kind].seconds for sides in rounds) for kind in KINDS}
    alone = max(median["generate"], median["train"])
    summary = {
        "efficiency_k2": alone / median["K = 2"],
        "efficiency_k0": alone / median["K = 0"],
        "generate_alone_seconds": median["generate"],
        "train_alone_seconds": median["train"],
        "step_seconds_k2": median["K = 2"],
        "step_seconds_k0": median["K = 0"],
        "others_share_k2": statistics.median(sides["K = 2"].cpu["others"] / sides["K = 2"].seconds for sides in rounds),
        "collector_share_k2": statistics.median(
            (sides["K = 2"].cpu.get("collector", 0.0) + sides["K = 2"].cpu.get("reward workers", 0.0))
            / sides["K = 2"].seconds
            for sides in rounds
        ),
    }
    print(json.dumps({**{name: round(value, 4) for name, value in summary.items()}, **about()}))


if __name__ == "__main__":
    main()
