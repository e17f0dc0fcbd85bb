"""``outrider demo``: a rollout server and a trainer, as the two processes they are, on a model that ships along."""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from rich.console import Console
from rich.table import Table

from outrider.cli.flag_help import help_text
from outrider.cli.flags import FlagSet, asks_for_help
from outrider.contract.errors import UserError
from outrider.contract.lifetime import die_with_parent
from outrider.contract.options import Section, option
from outrider.contract.output import show
from outrider.demo.task import problems, write_jsonl
from outrider.trainer.summary import Summary

MODEL = Path(__file__).parent / "model"

#: Seconds until the server must have taken its port; it loads its model after that.
LISTEN_DEADLINE = 60.0
#: Held-out problems of an evaluation.
HELD_OUT = 500


class DemoConfig(Section):
    """The demo."""

    steps: Annotated[int, option("Optimizer steps", ge=1)] = 70
    max_staleness: Annotated[int, option("K: how many versions generation may run ahead", ge=0)] = 2
    seed: Annotated[int, option("Seed of data order and sampling", ge=0)] = 0
    output_dir: Annotated[str, option("Directory under which the demo's runs are kept")] = "outrider-demo"
    engine: Annotated[str, option("Engine of the rollout server: torch, or vllm where it is installed")] = "torch"
    tensor_parallel_size: Annotated[int, option("Of the rollout server, with --engine vllm", ge=1)] = 1
    data_parallel_size: Annotated[int, option("Of the rollout server", ge=1)] = 1


DEMO = FlagSet("outrider demo", "Teaches a small model to add and subtract, in about half a minute.", (DemoConfig,))


def main(argv: list[str]) -> int:
    """Run the demo; its exit status."""
    if asks_for_help(argv):
        show(help_text(DEMO))
        return 0
    config = DEMO.parse(argv).section(DemoConfig)
    directory = new_directory(Path(config.output_dir))
    write_jsonl(directory / "train.jsonl", problems("train", 7000, config.seed))
    write_jsonl(directory / "heldout.jsonl", problems("heldout", HELD_OUT, config.seed))
    with running_server(config, directory) as port:
        status = run_trainer(train_command(config, directory, port))
    if status == 130:
        return status
    if status != 0:
        print(f"outrider demo: the trainer ended with status {status}; logs are in {directory}", file=sys.stderr)
        return status
    print_result(directory)
    return 0


def new_directory(parent: Path) -> Path:
    """A directory for this run: the first free number. Raises UserError."""
    try:
        for number in range(1, 100_000):
            with contextlib.suppress(FileExistsError):
                path = parent / f"run-{number:03d}"
                path.mkdir(parents=True)
                return path
    except OSError as error:
        raise UserError(f"--output_dir {parent}: cannot be made: {error.strerror}") from error
    raise UserError(f"--output_dir {parent}: is full of runs; delete some")


def cores() -> tuple[int, int]:
    """CPU threads for the server and for the trainer. A model this small gains nothing from more than two."""
    half = max(1, len(os.sched_getaffinity(0)) // 2)
    return min(half, 2), min(half, 2)


@contextlib.contextmanager
def running_server(config: DemoConfig, directory: Path) -> Iterator[int]:
    """The rollout server as a process; its port. It is drained and ended on leaving."""
    command = [
        *(sys.executable, "-m", "outrider.cli.main", "rollout", "--model", str(MODEL), "--engine", config.engine),
        *("--host", "127.0.0.1", "--port", "0", "--threads", str(cores()[0]), "--drain_timeout", "2"),
        *("--tensor_parallel_size", str(config.tensor_parallel_size)),
        *("--data_parallel_size", str(config.data_parallel_size)),
    ]
    log = directory / "server.log"
    with open(log, "wb") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            # A group of its own: Ctrl-C is for the trainer, which still needs the server to finish its step.
            process_group=0,
            # A demo that is killed, or whose terminal is closed, takes its server along.
            preexec_fn=functools.partial(die_with_parent, signal.SIGTERM),
        )
    try:
        yield listening_port(server, log)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def listening_port(server: "subprocess.Popen[bytes]", log: Path) -> int:
    """Wait until the server says on which port it listens. Raises UserError with its own words when it does not."""
    until = time.monotonic() + LISTEN_DEADLINE
    while time.monotonic() < until:
        text = log.read_text(errors="replace")
        if found := re.search(r"^listening on \S+:(\d+)", text, re.MULTILINE):
            return int(found.group(1))
        if server.poll() is not None:
            last = text.strip().splitlines()[-1:] or ["it said nothing"]
            raise UserError(f"the rollout server ended with status {server.returncode}: {last[0]}")
        time.sleep(0.05)
    raise UserError(f"the rollout server did not take a port within {LISTEN_DEADLINE:g} s; its log is {log}")


def train_command(config: DemoConfig, directory: Path, port: int) -> list[str]:
    """The very command that a user would type."""
    flags = {
        "model": MODEL,
        "vllm_server_host": "127.0.0.1",
        "vllm_server_port": port,
        "dataset": directory / "train.jsonl",
        "val_dataset": directory / "heldout.jsonl",
        "reward_funcs": "accuracy",
        "num_generations": 8,
        "per_device_train_batch_size": 256,
        "max_completion_length": 8,
        "temperature": 1.0,
        "max_staleness": config.max_staleness,
        "loss_type": "dapo",
        "beta": 0,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "weight_decay": 0,
        "adam_beta2": 0.999,
        "max_steps": config.steps,
        "eval_steps": 10,
        "save_steps": 0,
        "logging_steps": 5,
        "seed": config.seed,
        "threads": cores()[1],
        "output_dir": directory,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "outrider.cli.main", "train", *words]


def run_trainer(command: list[str]) -> int:
    """Run the trainer in the foreground; its exit status. Ctrl-C is the trainer's to answer: it finishes its step."""
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        # One process, however many GPUs there are: the batch is laid out for it.
        environment = {"NPROC_PER_NODE": "1", **os.environ}
        end_with_us = functools.partial(die_with_parent, signal.SIGTERM)
        return subprocess.Popen(command, preexec_fn=end_with_us, env=environment).wait()
    finally:
        signal.signal(signal.SIGINT, before)


def print_result(directory: Path) -> None:
    """Accuracy before and after, completions before and after, the report, and last one line of JSON."""
    summary = msgspec.json.decode((directory / "summary.json").read_bytes(), type=Summary)
    console = Console(highlight=False)
    table = Table("problem", "before", "after", title="Held-out problems")
    after = {prompt: (text, reward) for prompt, text, reward in summary.examples_after}
    for prompt, text, reward in summary.examples_before:
        table.add_row(prompt, mark(text, reward), mark(*after[prompt]) if prompt in after else "")
    console.print(table)
    before, now = summary.reward_before or 0.0, summary.reward_after or 0.0
    console.print(
        f"accuracy on {HELD_OUT} held-out problems: {before:.3f} before, {now:.3f} after {summary.steps} steps"
    )
    console.print(f"report: {directory / 'report.html'}", soft_wrap=True)
    console.print(f"rollouts: outrider show {directory}", soft_wrap=True)
    result = {
        "accuracy_before": round(before, 4),
        "accuracy_after": round(now, 4),
        "train_seconds": round(summary.train_seconds, 2),
        "steps": summary.steps,
        "max_staleness_seen": summary.max_staleness_seen,
    }
    print(json.dumps(result), flush=True)


def mark(text: str, reward: float) -> str:
    """A completion and whether it is right."""
    return f"{text} {'[green]✓[/green]' if reward > 0.5 else '[red]✗[/red]'}"
