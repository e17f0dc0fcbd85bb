"""Rows of tensors in files, as each rank has them, for any number of ranks to read.

The files are those of torch.distributed.checkpoint's storage of safetensors: each says where its rows begin. torch
reads them, every rank the rows that it needs. They are written without torch's planner, whose collectives would have
nothing to find out: what a rank has follows from its place.
"""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from outrider.contract.disk import synchronize
from outrider.contract.errors import UserError
from outrider.trainer.directories import first_line
from outrider.trainer.layout import Seat, answers_for, part_of
from outrider.trainer.sharding import local

#: Where a checkpoint has the optimizer's state.
OPTIMIZER = "optimizer"


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights by name, tied ones once; with several ranks, as they are sharded."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return {name: tensor.detach() for name, tensor in found.values()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, as ``<parameter>.<what it is>``."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """On disk, of the whole tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Rows(msgspec.Struct):
    """Rows of tensors by name, whole or a range of their columns, and at which place of the whole tensor each of them
    begins."""

    tensors: dict[str, Tensor]
    offsets: dict[str, list[int]]

    def write(self, path: Path) -> None:
        """As one file, which is on disk then. Raises OSError, SafetensorError."""
        places = {name: {"saved_offsets": offset} for name, offset in self.offsets.items()}
        metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places)}
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, path, metadata)
        synchronize(path)


class Share(msgspec.Struct, frozen=True):
    """What one of the ranks that have a copy of the model between them saves of it."""

    seat: Seat

    def rows(self, tensors: dict[str, Tensor]) -> Rows:
        """What it has of ``tensors``: its own memory, no copy. What several have is the first one's."""
        found = Rows({}, {})
        for name, tensor in tensors.items():
            rows = local(tensor)
            if rows.numel() and answers_for(tensor, self.seat):
                found.tensors[name] = rows
                found.offsets[name] = [span.start for span in part_of(tensor, self.seat)]
        return found

    def write(self, directory: Path, weights: Rows, optimizer: Rows) -> None:
        """Its files in a checkpoint. Raises OSError, SafetensorError."""
        name = f"{self.seat.index + 1:05}-of-{self.seat.parts:05}.safetensors"
        (directory / OPTIMIZER).mkdir(exist_ok=True)
        weights.write(directory / ("model.safetensors" if self.seat.parts == 1 else f"model-{name}"))
        optimizer.write(directory / OPTIMIZER / name)


def load_rows(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore this rank's rows of weights and optimizer state, whoever wrote them. Raises UserError."""
    _read(path, path, model_tensors(model))
    saved = _described(path, path / OPTIMIZER)
    names = {name: (index, parameter) for index, (name, parameter) in enumerate(_in_order(model, optimizer))}
    state: dict[int, dict[str, Tensor]] = {}
    wanted = {}
    for full, size in saved.items():
        name, _, key = full.rpartition(".")
        if name not in names:
            raise UserError(f"checkpoint {path}: its optimizer has {name}, which --model does not have")
        index, parameter = names[name]
        shape = tuple(parameter.shape)
        value = torch.zeros_like(parameter) if size == shape and size else torch.zeros(size)
        state.setdefault(index, {})[key] = wanted[full] = value.detach()
    _read(path, path / OPTIMIZER, wanted)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _in_order(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Names and parameters in the order in which the optimizer counts them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[id(parameter)], parameter


def _described(path: Path, directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors whose files are in ``directory``. Raises UserError where rows are missing."""
    found: dict[str, Any]
    try:
        found = dict(dcp.HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {path}: {directory} cannot be read: {first_line(error)}") from error
    for name, tensor in found.items():
        if sum(chunk.sizes.numel() for chunk in tensor.chunks) != tensor.size.numel():
            raise UserError(f"checkpoint {path}: rows of {name} are missing in {directory}: a file of it is gone")
    return {name: tuple(tensor.size) for name, tensor in found.items()}


def _read(path: Path, directory: Path, into: dict[str, Tensor]) -> None:
    found = _described(path, directory)
    for name, tensor in into.items():
        if found.get(name) != tuple(tensor.shape):
            raise UserError(
                f"checkpoint {path}: {name} has the shape {list(found[name]) if name in found else 'of nothing'} in "
                f"{directory} and {list(tensor.shape)} in --model"
            )
    reader = dcp.HuggingFaceStorageReader(str(directory))
    try:
        with warnings.catch_warnings(), _quiet("torch.distributed.checkpoint"):
            warnings.simplefilter("ignore")  # that no process group is used, on purpose: each rank reads for itself
            dcp.load(dict(into), storage_reader=reader, no_dist=True)
    except (CheckpointException, OSError, SafetensorError, RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"checkpoint {path}: {directory} cannot be loaded: {_cause(error)}") from error


@contextlib.contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """What it would log is said by the error that follows."""
    found = logging.getLogger(logger)
    before = found.level
    found.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        found.setLevel(before)


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(cause for cause, _ in error.failures.values())
    return first_line(error)
