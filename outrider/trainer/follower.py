"""Every rank but the first: it does what rank 0 tells, and nothing else."""

import contextlib
import os
import signal
import sys
from pathlib import Path
from urllib.parse import urlsplit

from outrider.contract.signals import hear_at_once
from outrider.trainer.checkpoint import checkpoint_path
from outrider.trainer.clock import StepClock
from outrider.trainer.directories import unfinished_path
from outrider.trainer.orders import End, Gather, Load, Open, Publish, Save, Step, Take, decode
from outrider.trainer.parts import (
    Description,
    Parts,
    load_parts,
    make_publisher,
    serve_weight_node,
    weight_node,
)
from outrider.trainer.ranks import Ranks
from outrider.trainer.saving import RowWriter
from outrider.trainer.spec import TrainerSpec
from outrider.trainer.spool import gathered
from outrider.trainer.step import StepWork
from outrider.weights.publish import Publisher
from outrider.weights.segment_server import outward_address, serve_in_thread


class Follower:
    """Its share of the model, and the loop over orders."""

    parts: Parts
    publisher: Publisher
    works: list[StepWork]
    writer: RowWriter

    def __init__(self, spec: TrainerSpec, ranks: Ranks) -> None:
        self.spec, self.ranks = spec, ranks
        self.run_id = spec.run_id
        self._signals, self._parent = 0, os.getppid()
        self.closers = contextlib.ExitStack()

    def run(self) -> int:
        """Until rank 0 says that the run has ended. Raises UserError."""
        # What becomes of the step is for rank 0 to say, which has heard Ctrl-C as well.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        hear_at_once((signal.SIGTERM,), self._stop)
        with self.closers:
            while True:
                match decode(self.ranks.hear()):
                    case Load(run_id=run_id, checkpoint=checkpoint):
                        self.run_id = run_id
                        self._load(None if checkpoint is None else Path(checkpoint))
                    case Open() as order:
                        self._open(order)
                    case Take(mini_batches=mini_batches):
                        self.works = self.parts.computer.prepare(mini_batches, StepClock())
                    case Step(mini_batch=number, learning_rate=rate):
                        self.parts.set_learning_rate(rate)
                        self.parts.computer.gradients(self.works[number], StepClock())
                        self.publisher.wait()
                        self.writer.wait_for_copy()
                        self.parts.optimizer.step()
                        self.parts.optimizer.zero_grad(set_to_none=True)
                    case Publish(version=version):
                        self.publisher.publish(version)
                    case Save(step=step, number=number):
                        path = checkpoint_path(Path(self.spec.run.output_dir), step)
                        self.writer.begin_report(unfinished_path(path), number)
                    case Gather():
                        for _ in gathered(self.parts.policy.model):
                            pass  # rank 0 keeps it
                    case End(status=status):
                        if status not in (0, 130) and self.ranks.node > 0 and self.ranks.local_rank == 0:
                            print("outrider: the run has ended; node 0 says why", file=sys.stderr)
                        return status

    def _load(self, checkpoint: Path | None) -> None:
        self.parts = load_parts(self.spec, self.ranks, checkpoint)
        self.writer = RowWriter(self.parts.policy, self.parts.optimizer, self.ranks)
        self.closers.callback(self.writer.close)

    def _stop(self, number: int) -> None:
        """Once means that rank 0 is to end the run; twice, or from a parent that is gone, that this one ends now."""
        self._signals += 1
        if self._signals > 1 or os.getppid() != self._parent:
            os._exit(128 + number)
        self.ranks.ask_to_stop()

    def _open(self, order: Open) -> None:
        """Segments of this rank, served where rank 0's host does not."""
        url = order.segment_url
        if self.ranks.node > 0:
            url = self._serve(order)
        description = Description(self.ranks, self.run_id, self.parts.policy)
        self.publisher = make_publisher(
            self.parts.policy, order.serving_dtype, self.run_id, url, description.give, self.ranks
        )
        self.closers.callback(self.publisher.close)

    def _serve(self, order: Open) -> str:
        """The URL under which servers reach this node's segments; its first rank serves them."""
        if self.ranks.local_rank > 0:
            return weight_node(self.ranks, self.run_id, self.ranks.node).url
        # A server on rank 0's own host is known there under an address that means this host here, if anything.
        address = outward_address(urlsplit(order.server_url).hostname or "", os.environ["MASTER_ADDR"])
        url, stop = serve_in_thread(address, order.key, self.run_id)
        self.closers.callback(stop)
        serve_weight_node(self.ranks, self.run_id, url)
        return url
