"""Whole weights, brought together from the ranks one after the other."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from mmap import mmap
from pathlib import Path

import torch
from torch import Tensor, nn

from outrider.trainer.directories import failure
from outrider.trainer.rows import model_tensors, total_bytes
from outrider.trainer.sharding import whole_tensor


def gathered(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Whole weights, one after the other. With several ranks, all of them take all of it."""
    for name, tensor in model_tensors(model).items():
        yield name, whole_tensor(tensor)


class Spool:
    """Whole weights in a file without a name beside what will be written of them: in the page cache as far as memory
    goes, and on disk beyond."""

    def __init__(self, directory: Path, model: nn.Module) -> None:
        """Of the same size as the weights of ``model``. Raises SaveFailed when there is no space."""
        tensors = model_tensors(model)
        nbytes = total_bytes(tensors.values())
        try:
            with tempfile.TemporaryFile(dir=directory) as file:
                # Reserves it: a full disk is an error here and not a bus error later.
                os.posix_fallocate(file.fileno(), 0, max(nbytes, 1))
                memory = torch.frombuffer(mmap(file.fileno(), max(nbytes, 1)), dtype=torch.uint8)
        except OSError as error:
            raise failure(directory / "the weights", error) from error
        self.weights: dict[str, Tensor] = {}
        end = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # keeps them aligned
            start, end = end, end + total_bytes([tensor])
            self.weights[name] = memory[start:end].view(tensor.dtype).view(tensor.shape)

    def take(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copy them into it; they are of one size with those it was made for."""
        for name, tensor in weights:
            self.weights[name].copy_(tensor)
        return self.weights
