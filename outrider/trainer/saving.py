"""Saving during a run, and at its end, when the result is in memory alone."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from outrider.contract.errors import UserError
from outrider.trainer.checkpoint import (
    Contents,
    SaveFailed,
    TrainerState,
    distinct_bytes,
    gathered,
    save_checkpoint,
    write_directory,
    write_model,
)
from outrider.trainer.config import RunConfig
from outrider.trainer.model import Policy
from outrider.trainer.orders import Gather, encode
from outrider.trainer.ranks import Ranks

#: Seconds within which the last saves are tried again when they fail, on a full disk say, and between two tries.
PATIENCE = 300.0
RETRY = 5.0


class Saver:
    """Writes checkpoints and the final model of one run. A periodic checkpoint is copied and written on a thread, one
    at a time, while training goes on."""

    def __init__(
        self,
        output_dir: Path,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        tokenizer: PreTrainedTokenizerBase,
        config: RunConfig,
        ranks: Ranks,
    ) -> None:
        self.output_dir, self.policy, self.optimizer = output_dir, policy, optimizer
        self.tokenizer, self.config = tokenizer, config
        self._ranks = ranks
        self.saved_step = -1
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._copied = threading.Event()
        self._copied.set()

    def checkpoint(self, step: int, max_steps: int, seconds: float) -> None:
        """Save what a resumed run needs, and return when it is on disk. Raises SaveFailed."""
        self._write(self._contents(step, max_steps, seconds))

    def begin_checkpoint(self, step: int, max_steps: int, seconds: float) -> None:
        """Start to save it. Weights and optimizer must not change until :meth:`wait_for_copy` returns, and the next
        one must not begin before :meth:`settle`."""
        contents = self._contents(step, max_steps, seconds)
        self._copied.clear()

        def run() -> None:
            try:
                copy = contents.copy() if self._ranks.size == 1 else contents
            finally:
                self._copied.set()
            self._write(copy)

        self._writing = self._thread.submit(run)

    def wait_for_copy(self) -> None:
        """Return when the checkpoint that is being saved no longer needs the trainer's own memory."""
        self._copied.wait()

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
        """Wait for what is being written."""
        self._thread.shutdown(wait=True)

    @property
    def exported(self) -> bool:
        """Whether ``final`` is there."""
        return (self.output_dir / "final").exists()

    def export(self) -> None:
        """Write ``final``, a Hugging Face directory. Raises SaveFailed."""
        model, (weights, _) = self.policy.model, self._state(optimizer=False)

        def write(directory: Path) -> None:
            write_model(directory, model, self.tokenizer, weights)

        write_directory(self.output_dir / "final", write, distinct_bytes(weights))

    def _contents(self, step: int, max_steps: int, seconds: float) -> Contents:
        weights, optimizer = self._state(optimizer=not self.config.save_only_model)
        state = TrainerState(step=step, max_steps=max_steps, time=seconds, model_fingerprint=self.policy.fingerprint)
        return Contents(
            state=state,
            model=self.policy.model,
            tokenizer=self.tokenizer,
            weights=weights,
            optimizer=optimizer,
        )

    def _state(self, optimizer: bool) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """Weights and, if wanted, the optimizer's state: the trainer's own memory, or with several ranks copies of
        what all of them hold."""
        if self._ranks.size == 1:
            return self.policy.model.state_dict(), self.optimizer.state_dict() if optimizer else None
        with self._ranks.together(encode(Gather(optimizer))):
            return gather(self.policy.model, self.optimizer if optimizer else None, keep=True)

    def _write(self, contents: Contents) -> None:
        save_checkpoint(self.output_dir, contents, self.config.save_total_limit)
        self.saved_step = contents.state.step


def gather(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, keep: bool
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Whole weights and optimizer state, for all ranks to call; only who keeps them has them then."""
    weights = gathered(dict(model.state_dict(keep_vars=True)), keep)
    return weights, None if optimizer is None else gathered(optimizer.state_dict(), keep)


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
