"""What periodic checkpoints cost of the time of steps, with one trainer process and with two.

    python bench/saving.py [--processes 1 2] [--window 3] [--rounds 16] [--rollouts 32] [--tokens 64] [--shape 0.6B]

A trainer of 4.8 million parameters, or of random weights in a shape of Qwen3, takes steps on random rollouts, without
servers. In windows of so many steps, in turn one without and one whose first step is followed by a checkpoint, which is
copied and written while the others run. What a save loses is the difference between neighbours, its median and
quartiles: windows are short, since the machine changes its pace within a minute by more than a save costs. The cost is
that of checkpoints a window apart, each of which waits for the end of the last one: that wait is told, and is none
where a window is longer than a save. The first save, for which memory is taken, is told apart. Every rank has one
thread.
Prints a table and, last, one line of JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from about import about
from models import save_bench_model
from rich.console import Console
from rich.table import Table

from outrider.cli.entry import leave

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
HERE = Path(__file__).resolve()
WARM_UP = 3


def run_rank(model: Path, directory: Path, options: argparse.Namespace) -> None:
    """One rank of the trainer; rank 0 prints the seconds of the windows as JSON: without, with, that the optimizer
    waited for a copy, from the beginning of a save to the end of the step in which it has ended, and from the end of a
    window to that of its save."""
    import torch
    from transformers import AutoTokenizer

    from outrider.algorithm.losses import LossSpec
    from outrider.contract.arrays import pack_floats, pack_ints
    from outrider.contract.feed import MiniBatch, Sample
    from outrider.trainer.checkpoint import checkpoint_path
    from outrider.trainer.clock import StepClock
    from outrider.trainer.config import BatchConfig, ModelConfig, OptimizerConfig, RunConfig
    from outrider.trainer.directories import unfinished_path
    from outrider.trainer.model import Policy
    from outrider.trainer.optimizer import make_optimizer
    from outrider.trainer.orders import Save, decode
    from outrider.trainer.ranks import Ranks
    from outrider.trainer.saving import RowWriter, Saver
    from outrider.trainer.step import StepComputer

    torch.set_num_threads(1)
    ranks = Ranks()
    on_gpu = torch.cuda.is_available()
    policy = Policy(ModelConfig(model=str(model)), str(model), 1.0, 2048, trainable=True, ranks=ranks)
    optimizer = make_optimizer(policy.model, OptimizerConfig())
    config = BatchConfig(max_tokens_per_micro_batch=16384) if on_gpu else BatchConfig(per_device_train_batch_size=8)
    loss = LossSpec(loss_type="dapo", beta=0.0, max_completion_length=options.tokens)
    computer = StepComputer(policy, None, loss, config, "token_truncate", 2.0, 1.0, ranks)
    draw = np.random.default_rng(0)
    samples = [
        Sample(
            group=index // 8,
            prompt=pack_ints(draw.integers(2, 500, 16)),
            completion=pack_ints(draw.integers(2, 500, options.tokens)),
            logprobs=pack_floats(np.full(options.tokens, -6.0)),
            advantage=float(draw.normal()),
            mask=b"",
        )
        for index in range(options.rollouts)
    ]
    batch = MiniBatch(samples=samples, sequences=len(samples), tokens=len(samples) * options.tokens)
    saver = writer = None
    if ranks.leads:
        tokenizer = AutoTokenizer.from_pretrained(model)
        saver = Saver(directory, policy, optimizer, tokenizer, RunConfig(save_total_limit=2), ranks)
    else:
        writer = RowWriter(policy, optimizer, ranks)

    def step() -> float:
        """The seconds that the optimizer waited for a copy."""
        clock = StepClock()
        [work] = computer.prepare([batch], clock)
        outcome = computer.gradients(work, clock)
        assert outcome.tokens == batch.tokens  # all of them are trained
        started = time.monotonic()
        (saver or writer).wait_for_copy()
        waited = time.monotonic() - started
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
        return waited

    def begin(number: int) -> None:
        if saver is not None:
            saver.begin_checkpoint(number, number, 10**6, 0.0)
        else:
            match decode(ranks.hear()):
                case Save(step=saved, number=report):
                    writer.begin_report(unfinished_path(checkpoint_path(directory, saved)), report)

    for _ in range(WARM_UP):
        step()
    found: dict[str, list[float]] = {"without": [], "with": [], "waited": [], "save": [], "end": []}
    for number in range(2 * (options.rounds + 1)):
        saves = number % 2 == 1
        waited = begun = took = 0.0
        started = time.monotonic()
        for index in range(options.window):
            waited += step()
            if saves and index == 0:
                begin(number)
                begun = time.monotonic()
            if saves and saver is not None and not took and index > 0 and saver.settled:
                took = time.monotonic() - begun
        stepped = time.monotonic()
        if saves and saver is not None:
            saver.settle()
            took = took or time.monotonic() - begun
        ended = time.monotonic()
        found["with" if saves else "without"].append(ended - started)
        if saves:
            found["waited"].append(waited)
            found["save"].append(took)
            found["end"].append(ended - stepped)
    if saver is not None:
        saver.close()
        found["first"] = [found["with"].pop(0) - found["without"].pop(0), found["end"].pop(0)]
        print(json.dumps(found), flush=True)
    else:
        writer.close()
    ranks.close()


def make_model(directory: Path, shape: str | None) -> Path:
    """Random weights of so many parameters, of the small model where no shape is given."""
    if shape is None:
        return save_bench_model(directory)
    from trainer import random_weights
    from vllm_servers import save_shape

    return random_weights(save_shape(directory, shape))


def main() -> None:
    """Measure each number of processes, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--window", type=int, default=3, help="steps, and steps from one checkpoint to the next")
    parser.add_argument("--rounds", type=int, default=16, help="windows of each kind")
    parser.add_argument("--rollouts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--shape", help="of the model, for a GPU; see bench/gpu/vllm_servers.py")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run_rank(Path(options.rank[0]), Path(options.rank[1]), options)
        leave(0)
    table = Table(
        "processes",
        "step",
        "lost by a save",
        "by the first",
        "half of them",
        "cost",
        "copy wait",
        "end wait",
        "a save takes",
    )
    summary = {}
    with tempfile.TemporaryDirectory() as place:
        model = make_model(Path(place) / "model", options.shape)
        for processes in options.processes:
            directory = Path(place) / f"run-{processes}"
            directory.mkdir()
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            command = [sys.executable, *(launcher if processes > 1 else ()), str(HERE), *sys.argv[1:]]
            environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*command, "--rank", str(model), str(directory)],
                env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode != 0:
                raise SystemExit(f"{processes} processes ended with status {done.returncode}:\n{done.stderr}")
            found = json.loads(done.stdout.strip().splitlines()[-1])
            step = statistics.median(found["without"]) / options.window
            pairs = zip(found["without"], found["with"], strict=True)
            low, lost, high = statistics.quantiles([(saves - without) * 1e3 for without, saves in pairs], n=4)
            cost = lost / 1e3 / (options.window * step)
            waited, whole, end = (statistics.median(found[name]) for name in ("waited", "save", "end"))
            first, first_end = found["first"]
            table.add_row(
                str(processes), f"{step * 1e3:.1f} ms", f"{lost:.0f} ms", f"{first * 1e3:.0f} ms",
                f"{low:.0f} to {high:.0f} ms", f"{cost:+.2%}",
                f"{waited * 1e3:.1f} ms", f"{end * 1e3:.1f} ms", f"{whole:.2f} s",
            )  # fmt: skip
            summary[f"processes_{processes}"] = {
                "step_ms": round(step * 1e3, 2),
                "saving_cost": round(cost, 4),
                "lost_ms_per_save": round(lost, 1),
                "lost_ms_quartiles": [round(low, 1), round(high, 1)],
                "copy_wait_ms": round(waited * 1e3, 2),
                "end_wait_ms": round(end * 1e3, 2),
                "first_ms": round(first * 1e3, 1),
                "first_end_wait_ms": round(first_end * 1e3, 2),
                "save_seconds": round(whole, 3),
            }
    Console(highlight=False).print(table)
    print(
        json.dumps({"shape": options.shape, "window": options.window, "rounds": options.rounds, **summary, **about()})
    )


if __name__ == "__main__":
    main()
