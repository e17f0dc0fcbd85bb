"""Checkpoints: a Hugging Face directory with the trainer's state beside it, written whole or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from outrider.contract.errors import UserError
from outrider.trainer.sharding import shared_like, whole_tensor

_STATE, _OPTIMIZER = "outrider_state.json", "optimizer.pt"
_PREFIX, _UNFINISHED, _REPLACED = "checkpoint-", ".unfinished", ".replaced"


class TrainerState(msgspec.Struct, kw_only=True):
    """What goes on in a resumed run. step: optimizer steps taken; time: seconds of training before."""

    step: int
    max_steps: int
    time: float
    model_fingerprint: str


class SaveFailed(Exception):
    """A directory could not be written; nothing of it is left, and earlier ones are untouched."""


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint. weights: by name, tied ones the same tensor. optimizer: its state dict; None leaves
    it out, and the checkpoint cannot be resumed."""

    state: TrainerState
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: dict[str, Tensor]
    optimizer: dict[str, Any] | None

    def copy(self) -> "Contents":
        """In memory of its own on the CPU, so that training can go on. Raises SaveFailed when there is not enough."""
        copies: dict[tuple[Any, ...], Tensor] = {}
        try:
            return replace(self, weights=_copied(self.weights, copies), optimizer=_copied(self.optimizer, copies))
        except (MemoryError, RuntimeError) as error:
            raise SaveFailed(f"{_PREFIX}{self.state.step}: no memory for a copy: {_first_line(error)}") from error

    @property
    def nbytes(self) -> int:
        """About what it takes on disk."""
        return distinct_bytes((self.weights, self.optimizer))


def save_checkpoint(output_dir: Path, contents: Contents, keep: int | None) -> Path:
    """Write ``checkpoint-<step>`` and remove all but the newest ``keep``. Raises SaveFailed."""
    path = output_dir / f"{_PREFIX}{contents.state.step}"

    def write(directory: Path) -> None:
        write_model(directory, contents.model, contents.tokenizer, contents.weights)
        if contents.optimizer is not None:
            torch.save(contents.optimizer, directory / _OPTIMIZER)
        (directory / _STATE).write_bytes(msgspec.json.encode(contents.state))

    write_directory(path, write, contents.nbytes)
    if keep is not None:
        for old in list_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return path


def write_model(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Tensor]
) -> None:
    """Weights, configuration and tokenizer as ``AutoModelForCausalLM.from_pretrained`` and vLLM load them."""
    # A copy of the dictionary: the library empties the one that it is given.
    model.save_pretrained(directory, state_dict=dict(weights))
    tokenizer.save_pretrained(directory)


def write_directory(path: Path, write: Callable[[Path], None], nbytes: int) -> None:
    """Have ``write(directory)`` fill a directory beside ``path`` and move it there when it is whole and on disk.

    nbytes: about what it will take. Where less is free nothing is written, since a disk that is filled to the brim
    takes the ledger's next rows from the collector, and with them the run. Raises SaveFailed.
    """
    unfinished = path.with_name(path.name + _UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        free = shutil.disk_usage(path.parent).free
        if free < nbytes:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: it takes {nbytes / 2**20:,.1f} MiB")
        unfinished.mkdir(parents=True)
        write(unfinished)
        for file in unfinished.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        _replace(path, unfinished)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        # A full disk is a RuntimeError where torch meets it, and an error of its own where safetensors does.
        shutil.rmtree(unfinished, ignore_errors=True)
        raise SaveFailed(f"{path}: {_first_line(error)}{_free_space(path.parent)}") from error


def _replace(path: Path, new: Path) -> None:
    """Put ``new`` where ``path`` is. What was there goes only when ``new`` has its place: whoever kills this process
    loses neither."""
    old = path.with_name(path.name + _REPLACED)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = []
    for path in output_dir.glob(f"{_PREFIX}*"):
        number = path.name.removeprefix(_PREFIX)
        if number.isdigit() and (path / _STATE).exists():
            found.append((int(number), path))
    return [path for _, path in sorted(found)]


def earliest_resume(output_dir: Path) -> int | None:
    """The step with which a run would go on from the oldest checkpoint; None where there is none to tell."""
    for path in list_checkpoints(output_dir)[:1]:
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode((path / _STATE).read_bytes(), type=TrainerState).step
    return None


def find_checkpoint(wanted: str, output_dir: Path) -> Path | None:
    """The directory to resume from. wanted: ``auto`` (the newest one that can be resumed, or None for a run that has
    no checkpoint yet) or a path. Raises UserError when there are checkpoints, and none that can be resumed."""
    path = Path(wanted)
    if wanted == "auto":
        saved = list_checkpoints(output_dir)
        if not saved:
            return None
        path = next((path for path in reversed(saved) if (path / _OPTIMIZER).exists()), saved[-1])
    if not (path / _STATE).exists():
        known = ", ".join(str(p) for p in list_checkpoints(output_dir)) or "none"
        raise UserError(f"--resume_from_checkpoint {wanted}: no checkpoint is there; those of the run: {known}")
    if not (path / _OPTIMIZER).exists():
        raise UserError(
            f"--resume_from_checkpoint {wanted}: {path} was saved with --save_only_model and cannot be resumed; start "
            f"a new run with --model {path} and another --output_dir"
        )
    return path


def load_state(path: Path, fingerprint: str) -> TrainerState:
    """The state of a checkpoint. Raises UserError when it is of another model or cannot be read."""
    try:
        state = msgspec.json.decode((path / _STATE).read_bytes(), type=TrainerState)
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(f"checkpoint {path}: {_STATE} cannot be read: {error}") from error
    if state.model_fingerprint != fingerprint:
        raise UserError(
            f"checkpoint {path} is of a model with fingerprint {state.model_fingerprint}, --model has {fingerprint}: "
            "resume with the model that the run was started with"
        )
    return state


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimizer's state. Raises UserError."""
    try:
        saved = torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, state in saved["state"].items():
            saved["state"][index] = {key: _visit(value, _sharer(parameters[index])) for key, value in state.items()}
        optimizer.load_state_dict(saved)
    except (OSError, RuntimeError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"checkpoint {path}: {_OPTIMIZER} cannot be loaded: {_first_line(error)}") from error


def distinct_bytes(value: Any) -> int:
    """Of all tensors in nested ``value``, those that are one counted once."""
    held: dict[tuple[Any, ...], Tensor] = {}
    _visit(value, lambda tensor: held.setdefault(_identity(tensor), tensor))
    return sum(tensor.nbytes for tensor in held.values())


def gathered(value: Any, keep: bool) -> Any:
    """A copy of nested ``value`` with whole tensors on the CPU; all ranks call it, and one that does not keep the
    copy gets nothing but None in the places of tensors. Tensors that are one object, such as tied weights, are one."""
    copies: dict[int, Tensor | None] = {}

    def copy(tensor: Tensor) -> Tensor | None:
        if id(tensor) not in copies:
            whole = whole_tensor(tensor.detach())
            copies[id(tensor)] = whole.to("cpu", copy=True) if keep else None
        return copies[id(tensor)]

    return _visit(value, copy)


def _sharer(parameter: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda value: shared_like(value, parameter)


def _visit(value: Any, take: Callable[[Tensor], Any]) -> Any:
    """``value`` with every tensor replaced by what ``take`` gives for it."""
    if isinstance(value, Tensor):
        return take(value)
    if isinstance(value, dict):
        return {key: _visit(item, take) for key, item in value.items()}
    return type(value)(_visit(item, take) for item in value) if isinstance(value, list | tuple) else value


def _copied(value: Any, copies: dict[tuple[Any, ...], Tensor]) -> Any:
    """A copy in which tensors that were one, such as tied weights, are one."""

    def copy(tensor: Tensor) -> Tensor:
        identity = _identity(tensor)
        if identity not in copies:
            copies[identity] = tensor.detach().to("cpu", copy=True)
        return copies[identity]

    return _visit(value, copy)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _free_space(directory: Path) -> str:
    with contextlib.suppress(OSError):
        return f" ({shutil.disk_usage(directory).free / 2**20:,.1f} MiB are free there)"
    return ""
