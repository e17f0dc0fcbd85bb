"""What a model's ``load_weights`` copies to where, recorded once, so that later versions are copied without it.

Recorded are rows (and a range of each other dimension) of a published tensor, and the place of a parameter that they
went to. Done again, copies are of a few MiB each, a few of them queued at a time: they hold neither Python's lock nor
the GPU's copy engine for long, and the steps of the engine need both.
"""

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Bytes of one copy, none of which goes across a multiple of it in the file that it is from. A step's own small copies
#: wait for those before them: for 0.15 ms at 55 GB/s.
CHUNK = 8 * 2**20
#: Copies that are queued at once. A thousand or so fill the queue, and who waits for room in it holds CUDA's lock.
QUEUED = 32


class Copy(NamedTuple):
    """A part of a published tensor, and where it goes. start, size: of the part in each dimension."""

    target: Tensor
    name: str
    start: tuple[int, ...]
    size: tuple[int, ...]


class Published(NamedTuple):
    """A published tensor: its parts, which are whole rows one after the other, by their places in a file. The places
    are multiples of an element's size."""

    dtype: str
    shape: tuple[int, ...]
    parts: list[tuple[int, Tensor]]

    def whole(self) -> Tensor:
        """All of it: a copy where it has several parts."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        if not self.parts:
            return torch.empty(self.shape, dtype=dtype)
        bytes = self.parts[0][1] if len(self.parts) == 1 else torch.cat([data for _, data in self.parts])
        return bytes.view(dtype).view(self.shape)


class _Source(NamedTuple):
    """A published tensor, by where it lies. It may be gone by now, and another one there."""

    begin: int
    end: int
    name: str
    stride: tuple[int, ...]
    dtype: torch.dtype


class Recorder(TorchDispatchMode):
    """Notes what is copied from published tensors to parameters while it is entered. parameters: all of the model."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        parameters = list(parameters)
        self._storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._expected = sum(parameter.numel() for parameter in parameters)
        self._sources: list[_Source] = []
        self._copies: list[Copy] = []
        self._filled = 0
        self._lost = False

    def source(self, name: str, tensor: Tensor) -> Tensor:
        """Announce a published tensor; returns it."""
        if tensor.numel():
            begin = tensor.data_ptr()
            source = _Source(begin, begin + tensor.nbytes, name, tensor.stride(), tensor.dtype)
            self._sources = [each for each in self._sources if each.end <= source.begin or each.begin >= source.end]
            bisect.insort(self._sources, source)
        return tensor

    def plan(self) -> "CopyPlan | None":
        """To do the same again; None where something else than copies has made the parameters what they are."""
        covered = sum(copy.target.numel() for copy in self._copies) + self._filled
        return CopyPlan(self._copies) if not self._lost and covered == self._expected else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reads = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
        if func in reads and self._origin(args[0]) is not None:
            self._lost = True  # a value that Python may have put anywhere
        elif func._schema.is_mutable and any(map(self._is_parameter, tree_leaves((args, kwargs)))):
            if func is torch.ops.aten.copy_.default and (copy := self._copy(*args[:2])) is not None:
                self._copies.append(copy)
            elif func in (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default):
                self._filled += args[0].numel()  # such as rows that pad a vocabulary: they stay
            else:
                self._lost = True
        return func(*args, **kwargs)

    def _is_parameter(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._storages

    def _origin(self, tensor: Tensor) -> _Source | None:
        """The published tensor that it is a view of."""
        place = tensor.data_ptr()
        at = bisect.bisect_right(self._sources, place, key=lambda source: source.begin) - 1
        return self._sources[at] if at >= 0 and place < self._sources[at].end else None

    def _copy(self, target: Tensor, tensor: Tensor) -> Copy | None:
        origin = self._origin(tensor)
        if origin is None:
            return None
        if tensor.shape != target.shape or tensor.stride() != origin.stride or tensor.dtype != origin.dtype:
            return None
        offset, start = (tensor.data_ptr() - origin.begin) // tensor.element_size(), []
        for stride in origin.stride:
            start.append(offset // stride)
            offset %= stride
        return Copy(target, origin.name, tuple(start), tuple(tensor.shape))


class CopyPlan:
    """Copies of any version of the same tensors."""

    def __init__(self, copies: list[Copy]) -> None:
        self._copies = copies

    def run(self, sources: dict[str, Published]) -> None:
        """sources: by name. On a GPU the copies go by way of the current stream, for which this waits now and then."""
        pairs = itertools.chain.from_iterable(_pairs(copy, sources[copy.name]) for copy in self._copies)
        while batch := list(itertools.islice(pairs, QUEUED)):
            targets, parts = map(list, zip(*batch, strict=True))
            torch._foreach_copy_(targets, parts, non_blocking=True)
            if targets[0].is_cuda:
                torch.cuda.current_stream(targets[0].device).synchronize()


def _pairs(copy: Copy, source: Published) -> Iterator[tuple[Tensor, Tensor]]:
    """Targets, and what is copied to each, one after the other."""
    dtype: torch.dtype = getattr(torch, source.dtype)
    shape = source.shape or (1,)
    begin, count = (copy.start[0], copy.size[0]) if source.shape else (0, 1)
    row = math.prod(shape[1:]) * dtype.itemsize
    whole = copy.target.view(count, *copy.target.shape[1:])
    narrow = whole.shape[1:] != shape[1:]
    first = 0
    for offset, data in source.parts:
        rows = len(data) // row
        low, high = max(begin, first), min(begin + count, first + rows)
        if low < high:
            target = whole[low - begin : high - begin]
            place = (low - first) * row
            found = offset + place, data[place : (high - first) * row].view(dtype)
            scattered = narrow or not target.is_contiguous()
            if scattered and _on_gpu(target):
                # Columns would be gathered by the CPU first, and then go slowly: whole rows go, and the GPU chooses.
                landing = torch.empty(high - low, *shape[1:], dtype=dtype, device=target.device)
                yield from _chunks(landing, *found)
                yield target, _columns(landing, copy)
            elif scattered:
                yield target, _columns(found[1].view(high - low, *shape[1:]), copy)
            else:
                yield from _chunks(target, *found)
        first += rows


def _on_gpu(target: Tensor) -> bool:
    return target.is_cuda


def _columns(rows: Tensor, copy: Copy) -> Tensor:
    for dimension in range(1, rows.ndim):
        rows = rows.narrow(dimension, copy.start[dimension], copy.size[dimension])
    return rows


def _chunks(target: Tensor, offset: int, data: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces that do not go across a multiple of CHUNK in the file. data: [n], at ``offset`` of it."""
    flat, size = target.view(-1), data.element_size()
    begin = 0
    while begin < len(data):
        end = min(len(data), ((offset + begin * size) // CHUNK + 1) * CHUNK // size - offset // size)
        yield flat[begin:end], data[begin:end]
        begin = end
