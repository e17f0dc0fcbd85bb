"""Reading a published version: from shared memory on the same host, over HTTP from another one."""

import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from urllib.request import Request, urlopen

import torch
import xxhash
from torch import Tensor

from outrider.contract.identity import host_identity
from outrider.contract.manifest import Manifest, Piece, Segment, TensorEntry

#: Connections over which a version is read from another host, and the seconds one piece may take.
HTTP_CONNECTIONS = 4
PIECE_TIMEOUT = 120.0

#: Copies ``length`` bytes at ``offset`` of a segment into a buffer.
Reader = Callable[[int, int, memoryview], None]


class FetchError(Exception):
    """A published version cannot be read, or its bytes are not those of its manifest."""


def fetch_tensors(manifest: Manifest, targets: dict[str, Tensor], key: str) -> None:
    """Fill ``targets`` (name → contiguous tensor, on any device, any dtype) with the version of ``manifest``.

    Every piece is copied first and then checked, so that bytes overwritten by the trainer in between are noticed.
    key: API key for other hosts. Raises FetchError; the targets are then in no defined state.
    """
    readers = [_reader(segment, key) for segment in manifest.segments]
    remote = any(not _shares_memory(segment) for segment in manifest.segments)
    with ThreadPoolExecutor(max_workers=HTTP_CONNECTIONS if remote else 1) as pool:
        # list() re-raises the first error.
        list(pool.map(lambda tensor: _fetch_tensor(tensor, targets[tensor.name], readers), manifest.tensors))


def _fetch_tensor(entry: TensorEntry, target: Tensor, readers: list[Reader]) -> None:
    dtype = getattr(torch, entry.dtype)
    direct = target.dtype == dtype and target.device.type == "cpu"
    landing = target if direct else torch.empty(entry.shape, dtype=dtype)
    buffer = memoryview(landing.reshape(-1).view(torch.uint8).numpy().data)
    start = 0
    for piece in entry.pieces:
        if piece.length == 0:  # of a rank that holds no rows of this tensor
            continue
        part = buffer[start : start + piece.length]
        readers[piece.segment](piece.offset, piece.length, part)
        _check(entry, piece, part)
        start += piece.length
    if not direct:
        target.copy_(landing)


def _check(entry: TensorEntry, piece: Piece, data: memoryview) -> None:
    if xxhash.xxh3_64_intdigest(data) != piece.checksum:
        raise FetchError(
            f"tensor {entry.name!r}: the bytes at offset {piece.offset} of segment {piece.segment} do not have the "
            "manifest's checksum (overwritten by a newer version, or corrupt)"
        )


def _shares_memory(segment: Segment) -> bool:
    return segment.host == host_identity() and os.path.exists(segment.path)


def _reader(segment: Segment, key: str) -> Reader:
    if _shares_memory(segment):
        return _memory_reader(segment)
    if segment.url is None:
        raise FetchError(f"segment {segment.path} is not on this host (any more), and the manifest gives no URL for it")
    return _http_reader(segment.url, key)


def _memory_reader(segment: Segment) -> Reader:
    try:
        with open(segment.path, "rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), segment.length, access=mmap.ACCESS_READ))
    except (OSError, ValueError, OverflowError) as error:
        raise FetchError(f"segment {segment.path}: {error}") from error

    def read(offset: int, length: int, target: memoryview) -> None:
        target[:] = mapped[offset : offset + length]

    return read


def _http_reader(url: str, key: str) -> Reader:
    def read(offset: int, length: int, target: memoryview) -> None:
        headers = {"Authorization": f"Bearer {key}", "Range": f"bytes={offset}-{offset + length - 1}"}
        received = 0
        try:
            with urlopen(Request(url, headers=headers), timeout=PIECE_TIMEOUT) as answer:
                while received < length:
                    count = answer.readinto(target[received:])
                    if not count:
                        break
                    received += count
        except (OSError, HTTPException, ValueError) as error:  # ValueError: it is no URL
            raise FetchError(f"{url}: {getattr(error, 'reason', error)}") from error
        if received != length:
            raise FetchError(f"{url}: {received} of {length} bytes at offset {offset}")

    return read
