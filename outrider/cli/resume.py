"""Whether a run can go on where it is asked to: what trainer and collector cannot know without each other."""

import contextlib
from pathlib import Path

from outrider.cli.specs import ledger_path
from outrider.contract.errors import UserError
from outrider.trainer.config import RunConfig


def check_resume(config: RunConfig) -> None:
    """Raises UserError, before anything is loaded, when there is no checkpoint to go on from, or the ledger is not the
    one that has its batches."""
    if config.resume_from_checkpoint is None:
        return
    from outrider.collector.resumption import mismatch
    from outrider.trainer.checkpoint import find_checkpoint, is_model, read_state

    checkpoint = find_checkpoint(config.resume_from_checkpoint, Path(config.output_dir))
    if checkpoint is None:
        return
    state = read_state(checkpoint)
    problem = mismatch(ledger_path(config), state.version, state.ledger)
    if problem is None:
        return
    fitting = _newest_that_fits(config)
    earlier = f"go on with --resume_from_checkpoint {fitting}, whose batches are recorded, or " if fitting else ""
    anew = f", or start a new run with --model {checkpoint} and another --output_dir" if is_model(checkpoint) else ""
    raise UserError(
        f"--resume_from_checkpoint {config.resume_from_checkpoint}: {checkpoint} {problem}, so that prompts would be "
        f"trained twice: {earlier}resume with the --output_dir of the run that saved it, or copy ledger.sqlite* and "
        f"rollouts from there{anew}"
    )


def _newest_that_fits(config: RunConfig) -> Path | None:
    """Of the run's own checkpoints with a batch behind them: after a power cut the ledger may lack what was written
    last."""
    from outrider.collector.resumption import mismatch
    from outrider.trainer.checkpoint import list_resumable, read_state

    for path in reversed(list_resumable(Path(config.output_dir))):
        with contextlib.suppress(UserError):  # it cannot be read
            state = read_state(path)
            if state.version and mismatch(ledger_path(config), state.version, state.ledger) is None:
                return path
    return None
