"""Saving during a run, and at its end, when the result is in memory alone."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from outrider.contract.errors import UserError
from outrider.trainer.checkpoint import (
    SaveFailed,
    TrainerState,
    model_bytes,
    save_checkpoint,
    write_directory,
    write_model,
)
from outrider.trainer.config import RunConfig
from outrider.trainer.model import Policy

#: Seconds within which the last saves are tried again when they fail, on a full disk say, and between two tries.
PATIENCE = 300.0
RETRY = 5.0


class Saver:
    """Writes checkpoints and the final model of one run."""

    def __init__(
        self, output_dir: Path, policy: Policy, optimizer: torch.optim.Optimizer, tokenizer: str, config: RunConfig
    ) -> None:
        """tokenizer: directory or hub id that the model's tokenizer is loaded from."""
        self.output_dir, self.policy, self.optimizer = output_dir, policy, optimizer
        self.tokenizer, self.config = tokenizer, config
        self.saved_step = -1

    def checkpoint(self, step: int, max_steps: int, seconds: float) -> None:
        """Save what a resumed run needs. Raises SaveFailed."""
        state = TrainerState(step=step, max_steps=max_steps, time=seconds, model_fingerprint=self.policy.fingerprint)
        optimizer = None if self.config.save_only_model else self.optimizer
        keep = self.config.save_total_limit
        save_checkpoint(self.output_dir, state, self.policy.model, self.tokenizer, optimizer, keep)
        self.saved_step = step

    @property
    def exported(self) -> bool:
        """Whether ``final`` is there."""
        return (self.output_dir / "final").exists()

    def export(self) -> None:
        """Write ``final``, a Hugging Face directory. Raises SaveFailed."""

        def write(directory: Path) -> None:
            write_model(directory, self.policy.model, self.tokenizer)

        write_directory(self.output_dir / "final", write, model_bytes(self.policy.model))


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
