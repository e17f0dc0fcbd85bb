"""The manifest: what a published version consists of, and where its pieces lie.

A segment is one contiguous run of bytes that one trainer rank wrote: a file in shared memory that servers on
the same host map, and that other servers read over HTTP by byte range. A tensor is the concatenation of its
pieces, in order: a rank that holds rows ``a:b`` of a row-major tensor holds one contiguous piece of it.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

DTypeName = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES: dict[DTypeName, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class Segment(msgspec.Struct, kw_only=True, frozen=True):
    """Where one rank's bytes lie. ``host`` identifies the kernel that shares the memory at ``path``."""

    host: str
    path: str
    length: int
    url: str | None = None


class Piece(msgspec.Struct, kw_only=True, frozen=True):
    """``length`` bytes at ``offset`` of ``segments[segment]``; ``checksum`` is their XXH3-64."""

    segment: int
    offset: int
    length: int
    checksum: int


class TensorEntry(msgspec.Struct, kw_only=True, frozen=True):
    """One tensor of the model, named as in its Hugging Face state dict."""

    name: str
    dtype: DTypeName
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class Manifest(msgspec.Struct, kw_only=True, frozen=True):
    """One version of the weights. ``run_id`` names the training run, so that versions of two runs never mix."""

    run_id: str
    version: int
    model_fingerprint: str
    segments: tuple[Segment, ...]
    tensors: tuple[TensorEntry, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def manifest_faults(manifest: Manifest) -> list[str]:
    """Every way in which ``manifest`` contradicts itself, in words; empty when it is sound."""
    faults = []
    names = [tensor.name for tensor in manifest.tensors]
    if len(set(names)) != len(names):
        faults.append("a tensor is listed twice")
    faults += [f"segment {s.path}: its length {s.length} is negative" for s in manifest.segments if s.length < 0]
    for tensor in manifest.tensors:
        if any(size < 0 for size in tensor.shape):
            faults.append(f"tensor {tensor.name!r}: its shape {list(tensor.shape)} has a negative size")
        held = sum(piece.length for piece in tensor.pieces)
        if held != tensor.nbytes:
            faults.append(f"tensor {tensor.name!r}: its pieces hold {held} bytes, its shape needs {tensor.nbytes}")
        for piece in tensor.pieces:
            if not 0 <= piece.segment < len(manifest.segments):
                faults.append(f"tensor {tensor.name!r}: segment {piece.segment} does not exist")
            elif piece.offset < 0 or piece.length < 0:
                faults.append(f"tensor {tensor.name!r}: a piece of {piece.length} bytes at offset {piece.offset}")
            elif piece.offset + piece.length > manifest.segments[piece.segment].length:
                faults.append(f"tensor {tensor.name!r}: a piece ends beyond its segment")
    return faults


def joined(parts: Sequence[Manifest], first_rows: Sequence[Mapping[str, int]] | None = None) -> Manifest:
    """One version of which each rank has described its own rows. first_rows: for each rank, where its rows of a tensor
    begin; without it, they lie in the order of the ranks."""
    first = parts[0]
    starts = list(itertools.accumulate((len(part.segments) for part in parts), initial=0))
    tensors = []
    for entries in zip(*(part.tensors for part in parts), strict=True):
        order = list(range(len(parts)))
        if first_rows is not None:
            order.sort(key=lambda rank: first_rows[rank][entries[0].name])
        pieces = tuple(
            msgspec.structs.replace(piece, segment=starts[rank] + piece.segment)
            for rank in order
            for piece in entries[rank].pieces
        )
        tensors.append(msgspec.structs.replace(entries[0], pieces=pieces))
    segments = tuple(segment for part in parts for segment in part.segments)
    return msgspec.structs.replace(first, segments=segments, tensors=tuple(tensors))
