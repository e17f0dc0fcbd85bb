"""Checkpoints: directories of rows of every tensor, as each rank has them, written whole or not at all.

    model.safetensors, or model-00001-of-00002.safetensors ...   weights
    optimizer/00001-of-00002.safetensors ...                      AdamW's moments, "<parameter>.exp_avg" and so on
    outrider_state.json, configuration and tokenizer

With one process the directory is a Hugging Face one.
"""

import contextlib
import shutil
from pathlib import Path

import msgspec
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from outrider.contract.errors import UserError
from outrider.trainer.rows import OPTIMIZER

_STATE, _OLD_OPTIMIZER = "outrider_state.json", "optimizer.pt"
_PREFIX = "checkpoint-"
_SHARD_SIZE = "5GB"


class TrainerState(msgspec.Struct, kw_only=True):
    """What goes on in a resumed run. step: optimizer steps taken; version: batches trained; time: seconds of training
    before. ledger: id of the one that has these batches; model: what the run was started with; both empty in
    checkpoints of versions that did not keep them."""

    step: int
    version: int
    max_steps: int
    time: float
    model_fingerprint: str
    ledger: str = ""
    model: str = ""


def write_model(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Tensor]
) -> None:
    """Weights, configuration and tokenizer as ``AutoModelForCausalLM.from_pretrained`` and vLLM load them."""
    # A copy of the dictionary: the library empties the one that it is given.
    model.save_pretrained(directory, state_dict=dict(weights), max_shard_size=_SHARD_SIZE)
    tokenizer.save_pretrained(directory)


def write_description(
    directory: Path, state: TrainerState, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """What a checkpoint has beside tensors."""
    model.config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    write_state(directory, state)


def write_state(directory: Path, state: TrainerState) -> None:
    """What a run goes on from."""
    (directory / _STATE).write_bytes(msgspec.json.encode(state))


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Of the checkpoint after a step."""
    return output_dir / f"{_PREFIX}{step}"


def remove_older(output_dir: Path, keep: int | None) -> None:
    """All but the newest ``keep`` checkpoints; None keeps all."""
    for old in list_checkpoints(output_dir)[:-keep] if keep is not None else ():
        shutil.rmtree(old, ignore_errors=True)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = []
    for path in output_dir.glob(f"{_PREFIX}*"):
        number = path.name.removeprefix(_PREFIX)
        if number.isdigit() and (path / _STATE).exists():
            found.append((int(number), path))
    return [path for _, path in sorted(found)]


def list_resumable(output_dir: Path) -> list[Path]:
    """Those with which a run can go on, oldest first."""
    return [path for path in list_checkpoints(output_dir) if (path / OPTIMIZER).is_dir()]


def earliest_resume(output_dir: Path) -> int | None:
    """The batch with which a run would go on from the oldest checkpoint, from 0; None where there is none to tell."""
    for path in list_checkpoints(output_dir)[:1]:
        with contextlib.suppress(UserError):
            return read_state(path).version
    return None


def find_checkpoint(wanted: str, output_dir: Path) -> Path | None:
    """The directory to resume from. wanted: ``auto`` (the newest one that can be resumed, or None for a run that has
    no checkpoint yet) or a path. Raises UserError when there are checkpoints, and none that can be resumed."""
    path = Path(wanted)
    if wanted == "auto":
        saved = list_checkpoints(output_dir)
        if not saved:
            return None
        path = (list_resumable(output_dir) or saved)[-1]
    if not (path / _STATE).exists():
        known = ", ".join(str(p) for p in list_checkpoints(output_dir)) or "none"
        raise UserError(f"--resume_from_checkpoint {wanted}: no checkpoint is there; those of the run: {known}")
    if not (path / OPTIMIZER).is_dir():
        old = (path / _OLD_OPTIMIZER).exists()
        why = "by an earlier version, in another format" if old else "with --save_only_model"
        raise UserError(
            f"--resume_from_checkpoint {wanted}: {path} was saved {why}, and cannot be resumed; start "
            f"a new run with --model {path} and another --output_dir"
        )
    return path


def read_state(path: Path) -> TrainerState:
    """The state of a checkpoint. Raises UserError when it cannot be read."""
    try:
        return msgspec.json.decode((path / _STATE).read_bytes(), type=TrainerState)
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(f"checkpoint {path}: {_STATE} cannot be read: {error}") from error


def is_model(path: Path) -> bool:
    """Whether a checkpoint can be given as --model: the one of a single process, which has all rows of every tensor."""
    return (path / "model.safetensors").exists()


def load_state(path: Path, model: str, fingerprint: str) -> TrainerState:
    """The state of a checkpoint. model: that of this run, which has ``fingerprint``. Raises UserError when it is of
    another one or cannot be read."""
    state = read_state(path)
    if state.model_fingerprint != fingerprint:
        raise UserError(
            f"checkpoint {path} is of {state.model or 'another model'} (fingerprint {state.model_fingerprint}), this "
            f"run has --model {model} (fingerprint {fingerprint}): resume with the model that the run was started with"
        )
    return state
