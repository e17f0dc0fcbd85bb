"""Saving during a run, and at its end, when the result is in memory alone."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from outrider.contract.errors import UserError
from outrider.trainer.checkpoint import (
    TrainerState,
    checkpoint_path,
    remove_older,
    write_description,
    write_model,
    write_state,
)
from outrider.trainer.config import RunConfig
from outrider.trainer.directories import (
    SaveFailed,
    begin_directory,
    finishing,
    first_line,
    tidy,
    write_directory,
)
from outrider.trainer.model import Policy
from outrider.trainer.orders import Gather, Save, encode
from outrider.trainer.ranks import Ranks
from outrider.trainer.rows import Rows, Share, model_tensors, optimizer_tensors, total_bytes
from outrider.trainer.spool import Spool, gathered

#: Seconds within which the last saves are tried again when they fail, on a full disk say, and between two tries.
PATIENCE = 300.0
RETRY = 5.0
#: Seconds that other ranks may take longer than this one to write their rows, the same when the run is ending, and
#: between two looks.
OTHERS, FAREWELL, LOOK = 900.0, 10.0, 0.05


class HostCopy:
    """Copies of tensors in host memory, which is kept for the next ones; pinned beside a GPU."""

    def __init__(self) -> None:
        self._memory: dict[tuple[int, str], Tensor] = {}
        self._stream: torch.cuda.Stream | None = None

    @torch.no_grad()
    def take(self, groups: Sequence[dict[str, Tensor]], ready: "torch.cuda.Event | None") -> list[dict[str, Tensor]]:
        """Copy them, from a GPU on a stream of its own once ``ready`` has come. Raises RuntimeError, MemoryError."""
        if ready is not None:
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            copies = [
                {name: self._copy((index, name), tensor, ready is not None) for name, tensor in group.items()}
                for index, group in enumerate(groups)
            ]
        if self._stream is not None:
            self._stream.synchronize()
        return copies

    def _copy(self, key: tuple[int, str], tensor: Tensor, pinned: bool) -> Tensor:
        held = self._memory.get(key)
        if held is None:  # a tensor has one shape as long as a run lives
            held = self._memory[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return held.copy_(tensor, non_blocking=pinned)


class RowWriter:
    """Copies and writes this rank's rows on a thread, for one checkpoint at a time, while training goes on."""

    def __init__(self, policy: Policy, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
        self.policy, self.optimizer = policy, optimizer
        self._ranks = ranks
        self._share = Share(ranks.seat())
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._memory = HostCopy()
        self._ready: torch.cuda.Event | None = None
        self._copied = threading.Event()
        self._copied.set()

    def begin(self, work: Callable[[], None]) -> Future[None]:
        """Do ``work`` on the thread. Weights and optimizer must not change until :meth:`wait_for_copy` returns, which
        it does when ``work`` has copied what it needs, or has ended."""
        self._copied.clear()
        if self.policy.device.type == "cuda":
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(self.policy.device))

        def run() -> None:
            try:
                self._use_device()
                work()
            finally:
                self._copied.set()

        return self._thread.submit(run)

    def begin_report(self, directory: Path, number: int) -> None:
        """On any rank but the first: write the rows, and leave word for the first rank of how it went."""

        if not self._ranks.in_first_copy:
            return
        rows = self.rows()

        def work() -> None:
            problem = "it stopped writing"
            try:
                self.write(directory, rows)
                problem = ""
            except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
                problem = first_line(error)
            finally:
                self._ranks.put(report_name(number, self._ranks.rank), problem)

        self.begin(work)

    def rows(self) -> tuple[Rows, Rows]:
        """This rank's rows of weights and moments, no copies. Between two steps: while one is computed, what the model
        calls its parameters is what has been gathered."""
        model = self.policy.model
        return self._share.rows(model_tensors(model)), self._share.rows(optimizer_tensors(model, self.optimizer))

    def write(self, directory: Path, rows: tuple[Rows, Rows]) -> None:
        """On the thread: copy the rows, then write them."""
        weights, moments = rows
        weights.tensors, moments.tensors = self.copy(weights.tensors, moments.tensors)
        self._share.write(directory, weights, moments)

    def copy(self, *tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """On the thread: copies of the trainer's own memory, which may change from now on."""
        copies = self._memory.take(tensors, self._ready)
        self._copied.set()
        return copies

    def wait_for_copy(self) -> None:
        """Return when what is being saved no longer needs the trainer's own memory."""
        self._copied.wait()

    def close(self) -> None:
        """Wait for what is being written."""
        self._thread.shutdown(wait=True)

    def _use_device(self) -> None:
        """A thread begins on the first GPU, and would make a context of CUDA there."""
        if self.policy.device.type == "cuda":
            torch.cuda.set_device(self.policy.device)


def report_name(number: int, rank: int) -> str:
    """Under which a rank says how its part of the checkpoint, the ``number``-th of this process, has gone."""
    return f"saved/{number}/{rank}"


class Saver:
    """Saves checkpoints and the final model of one run; rank 0 has it. A periodic checkpoint is copied and written
    on a thread, by every rank for itself, while training goes on."""

    def __init__(
        self,
        output_dir: Path,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        tokenizer: PreTrainedTokenizerBase,
        config: RunConfig,
        ranks: Ranks,
        ledger: str = "",
        model: str = "",
    ) -> None:
        """ledger: id of the run's ledger. model: what the run was started with."""
        self.output_dir, self.policy, self.optimizer = output_dir, policy, optimizer
        self.tokenizer, self.config = tokenizer, config
        self._ranks, self._ledger, self._model = ranks, ledger, model
        self._writer = RowWriter(policy, optimizer, ranks)
        self.saved_step = -1
        self._number = 0
        self._writing: Future[None] | None = None
        self._closing = threading.Event()
        tidy(output_dir)

    def checkpoint(self, step: int, version: int, max_steps: int, seconds: float) -> None:
        """Save what a resumed run needs, and return when it is on disk. Raises SaveFailed."""
        self.begin_checkpoint(step, version, max_steps, seconds)
        self.settle()

    def begin_checkpoint(self, step: int, version: int, max_steps: int, seconds: float) -> None:
        """Start to save it. Weights and optimizer must not change until :meth:`wait_for_copy` returns, and the next
        one must not begin before :meth:`settle`."""
        state = TrainerState(
            step=step,
            version=version,
            max_steps=max_steps,
            time=seconds,
            model_fingerprint=self.policy.fingerprint,
            ledger=self._ledger,
            model=self._model,
        )
        begin = self._begin_model if self.config.save_only_model else self._begin_rows
        try:
            self._writing = begin(checkpoint_path(self.output_dir, step), state)
        except SaveFailed as failed:
            self._writing = Future()
            self._writing.set_exception(failed)

    def wait_for_copy(self) -> None:
        """Return when the checkpoint that is being saved no longer needs the trainer's own memory."""
        self._writer.wait_for_copy()

    @property
    def settled(self) -> bool:
        """Whether :meth:`settle` would return, or raise, at once."""
        return self._writing is None or self._writing.done()

    def settle(self) -> bool:
        """Wait for the checkpoint that is being saved; whether there was one. Raises SaveFailed if it could not be."""
        if self._writing is None:
            return False
        writing, self._writing = self._writing, None
        writing.result()
        return True

    def close(self) -> None:
        """Wait for what is being written, but not long for other ranks."""
        self._closing.set()
        self._writer.close()

    @property
    def exported(self) -> bool:
        """Whether ``final`` is there."""
        return (self.output_dir / "final").exists()

    def export(self) -> None:
        """Write ``final``, a Hugging Face directory. Raises SaveFailed."""
        weights = model_tensors(self.policy.model) if self._ranks.mesh is None else self._gather()

        def write(directory: Path) -> None:
            write_model(directory, self.policy.model, self.tokenizer, weights)

        write_directory(self.output_dir / "final", write, total_bytes(weights.values()))

    def _begin_rows(self, path: Path, state: TrainerState) -> Future[None]:
        """A checkpoint of every rank's rows."""
        model = self.policy.model
        tensors = [*model_tensors(model).values(), *optimizer_tensors(model, self.optimizer).values()]
        unfinished = begin_directory(path, total_bytes(tensors))
        self._number += 1
        number, rows = self._number, self._writer.rows()

        def work() -> None:
            with finishing(path):
                try:
                    self._writer.write(unfinished, rows)
                    write_description(unfinished, state, model, self.tokenizer)
                finally:  # nobody else writes there when it is moved or removed
                    problems = self._hear_others(number)
                if problems:
                    raise SaveFailed(f"{path}: {'; '.join(problems)}")
            self._saved(state)

        # All ranks copy what they have at this moment, and nobody waits for anybody.
        with self._ranks.together(encode(Save(state.step, number))):
            return self._writer.begin(work)

    def _begin_model(self, path: Path, state: TrainerState) -> Future[None]:
        """A Hugging Face directory."""
        model = self.policy.model
        weights = model_tensors(model) if self._ranks.mesh is None else self._gather()

        def work() -> None:
            # What was gathered is nobody else's.
            copied = self._writer.copy(weights if self._ranks.mesh is None else {})[0] or weights

            def write(directory: Path) -> None:
                write_model(directory, model, self.tokenizer, copied)
                write_state(directory, state)

            write_directory(path, write, total_bytes(copied.values()))
            self._saved(state)

        return self._writer.begin(work)

    def _gather(self) -> dict[str, Tensor]:
        """Whole weights of all ranks. Raises SaveFailed."""
        spool = Spool(self.output_dir, self.policy.model)
        with self._ranks.together(encode(Gather())):
            return spool.take(gathered(self.policy.model))

    def _hear_others(self, number: int) -> list[str]:
        """Wait for the other ranks to have written their rows; what they say that went wrong."""
        problems: list[str] = []
        until = time.monotonic() + OTHERS
        for rank in range(1, self._ranks.shards):
            name = report_name(number, rank)
            while not self._ranks.has(name):
                if self._closing.is_set():
                    until = min(until, time.monotonic() + FAREWELL)
                if time.monotonic() > until:
                    return [*problems, f"rank {rank} has not written its rows"]
                time.sleep(LOOK)
            if problem := self._ranks.take(name):
                problems.append(f"rank {rank}: {problem}")
        return problems

    def _saved(self, state: TrainerState) -> None:
        remove_older(self.output_dir, self.config.save_total_limit)
        self.saved_step = state.step


def patiently(save: Callable[[], None], what: str, notice: Callable[[str], None], hurry: Callable[[], bool]) -> None:
    """Save, waiting for space where there is none. Raises UserError after ``PATIENCE`` seconds, or on ``hurry()``."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            save()
            return
        except SaveFailed as error:
            if time.monotonic() > until or hurry():
                raise UserError(
                    f"{what} could not be saved: {error}; free space, then go on with --resume_from_checkpoint auto"
                ) from error
            notice(f"{what} could not be saved: {error}; free space: tried again for {PATIENCE:g} s")
            again = time.monotonic() + RETRY
            while time.monotonic() < again and not hurry():
                time.sleep(0.1)
