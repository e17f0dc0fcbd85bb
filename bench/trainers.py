"""Trainers that do a part of a trainer's work, or keep what they make, for measuring.

    python bench/trainers.py consume FLAGS...            takes batches and publishes, computes no gradients
    python bench/trainers.py replay LEDGER FLAGS...      trains the batches of a finished run, without servers
    python bench/trainers.py keep EVERY FILE FLAGS...    trains, and writes its weights of every so many steps to FILE

FLAGS are those of ``outrider train``. All three run the trainer's own loop, so that what they leave in
``metrics.jsonl`` is counted alike.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from outrider.cli.specs import make_specs
from outrider.cli.train import prepare_output_dir
from outrider.cli.train_config import parse_train, resolve
from outrider.collector.groups import mini_batches
from outrider.collector.ledger import Ledger
from outrider.contract.feed import Batch, BatchStats, EvalResult, FromTrainer, MiniBatch, Ready
from outrider.contract.manifest import Manifest
from outrider.trainer.clock import StepClock
from outrider.trainer.link import CollectorLink
from outrider.trainer.ranks import Ranks
from outrider.trainer.run import Trainer, prepare
from outrider.trainer.spec import TrainerSpec
from outrider.trainer.step import StepOutcome, StepWork


class NoGradients:
    """In place of what computes gradients, and of the optimizer."""

    param_groups: tuple[dict[str, float], ...] = ()

    def prepare(self, mini_batches: list[MiniBatch], clock: StepClock) -> list[StepWork]:
        return [StepWork(mini_batch, []) for mini_batch in mini_batches]

    def gradients(self, work: StepWork, clock: StepClock) -> StepOutcome:
        return StepOutcome()

    def step(self) -> None:
        pass

    def zero_grad(self, set_to_none: bool) -> None:
        pass


class Consumer(Trainer):
    """Asks for batches as fast as they come. Weights are published after each, unchanged."""

    def load(self) -> None:
        super().load()
        nothing: Any = NoGradients()
        self.parts = replace(self.parts, computer=nothing, optimizer=nothing)


class ReplayLink(CollectorLink):
    """Hands out batches that are in memory."""

    batches: list[Batch]

    def start(self, spec: bytes) -> None:
        pass

    def ready(self, deadline: float) -> Ready:
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"  # as a server of the same machine serves it
        return Ready(servers=[], serving_dtype=dtype, prompts=1, evaluation_prompts=0, segment_url="", ledger="")

    def batch(self) -> Batch:
        return self.batches.pop(0)

    def send(self, message: FromTrainer) -> None:
        pass

    def announce(self, manifest: Manifest) -> None:
        pass

    def arrived_evaluations(self) -> list[EvalResult]:
        return []


class Replayer(Trainer):
    """Trains batches of a ledger."""

    def __init__(self, spec: TrainerSpec, output_dir: Path, batches: list[Batch]) -> None:
        super().__init__(spec, output_dir, Ranks())
        link = ReplayLink(self.panel, lambda: self.interrupt.requested, output_dir / "collector.log")
        link.batches = batches
        self.link.close()
        self.link = link


class Keeper(Trainer):
    """Keeps copies of its weights in memory, and writes them when it has ended."""

    def __init__(self, spec: TrainerSpec, output_dir: Path, every: int, file: Path) -> None:
        """every: steps between two copies."""
        super().__init__(spec, output_dir, Ranks())
        self.every, self.file = every, file
        self.kept: list[dict[str, object]] = []

    def _one_batch(self) -> None:
        super()._one_batch()
        if self.step % self.every == 0:
            seconds = time.monotonic() - (self.started or 0.0)
            weights = {name: value.clone() for name, value in self.parts.policy.published_tensors().items()}
            self.kept.append({"step": self.step, "seconds": seconds, "weights": weights})

    def close(self) -> None:
        super().close()
        torch.save(self.kept, self.file)


def read_batches(path: Path, spec: TrainerSpec) -> list[Batch]:
    """The batches of a finished run, in order, with the mini-batches that ``spec`` asks for."""
    ledger = Ledger(path, {}, resume=True)
    try:
        replays = ledger.backlog(0).replays
    finally:
        ledger.close()
    nothing: dict[str, Any] = dict.fromkeys(BatchStats.__struct_fields__, 0) | {"rewards": {}}
    return [
        Batch(
            number=number,
            mini_batches=mini_batches(groups, spec.mini_batches, f"{spec.run.seed}/batch {number}", True),
            stats=msgspec.convert(nothing, BatchStats),
        )
        for number, groups in sorted(replays.items())
    ]


def main() -> int:
    """Run one of them; its exit status."""
    kind, *words = sys.argv[1:]
    own = {"consume": 0, "replay": 1, "keep": 2}[kind]
    config = parse_train(words[own:])
    spec, collector = make_specs(config, resolve(config))
    output_dir = Path(spec.run.output_dir)
    prepare_output_dir(output_dir)
    prepare(spec)
    if kind == "consume":
        trainer: Trainer = Consumer(spec, output_dir, Ranks())
    elif kind == "replay":
        trainer = Replayer(spec, output_dir, read_batches(Path(words[0]), spec))
    else:
        trainer = Keeper(spec, output_dir, int(words[0]), Path(words[1]))
    return trainer.run(msgspec.msgpack.encode(collector))


if __name__ == "__main__":
    sys.exit(main())
