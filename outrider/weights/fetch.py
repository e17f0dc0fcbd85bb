"""Reading a published version: from shared memory on the same host, over HTTP from another one."""

import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from http import HTTPStatus
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from outrider.contract.identity import host_identity
from outrider.contract.manifest import Manifest, Segment, TensorEntry
from outrider.weights.checksums import FetchError, check_piece, map_segment

#: Connections over which a version is read from another host.
HTTP_CONNECTIONS = 4
#: Seconds without a byte after which a host counts as gone, and how often one range is taken up again where a
#: connection has broken off.
SILENCE = 30.0
RESUMPTIONS = 3
#: Bytes of one range: large tensors travel over several connections.
RANGE = 64 * 2**20

#: Copies ``length`` bytes at ``offset`` of a segment into a buffer.
Reader = Callable[[int, int, memoryview], None]


def fetch_tensors(manifest: Manifest, targets: dict[str, Tensor], key: str) -> None:
    """Fill ``targets`` (name → contiguous tensor, on any device, any dtype) with the version of ``manifest``.

    Every piece is copied first and then checked, so that bytes overwritten by the trainer in between are noticed.
    key: API key for other hosts. Raises FetchError; the targets are then in no defined state.
    """
    workers = 1 if on_this_host(manifest) else HTTP_CONNECTIONS
    with ThreadPoolExecutor(workers) as tensors, ThreadPoolExecutor(workers) as ranges:
        readers = [_reader(segment, key, ranges) for segment in manifest.segments]
        # list() re-raises the first error.
        list(tensors.map(lambda tensor: _fetch_tensor(tensor, targets[tensor.name], readers), manifest.tensors))


def on_this_host(manifest: Manifest) -> bool:
    """Whether every piece lies in memory that this host shares with its publisher."""
    return all(_shares_memory(segment) for segment in manifest.segments)


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
        check_piece(entry, piece, part)
        start += piece.length
    if not direct:
        target.copy_(landing)


def _shares_memory(segment: Segment) -> bool:
    return segment.host == host_identity() and os.path.exists(segment.path)


def _reader(segment: Segment, key: str, ranges: Executor) -> Reader:
    if _shares_memory(segment):
        return _memory_reader(segment)
    if segment.url is None:
        raise FetchError(f"segment {segment.path} is not on this host (any more), and the manifest gives no URL for it")
    return _http_reader(segment.url, key, ranges)


def _memory_reader(segment: Segment) -> Reader:
    mapped = map_segment(segment)

    def read(offset: int, length: int, target: memoryview) -> None:
        target[:] = mapped[offset : offset + length]

    return read


def _http_reader(url: str, key: str, ranges: Executor) -> Reader:
    def read(offset: int, length: int, target: memoryview) -> None:
        starts = range(0, length, RANGE)
        if len(starts) == 1:
            _read_range(url, key, offset, target)
            return
        parts = [target[start : start + RANGE] for start in starts]
        jobs = [
            ranges.submit(_read_range, url, key, offset + start, part)
            for start, part in zip(starts, parts, strict=True)
        ]
        for job in jobs:
            job.result()

    return read


def _read_range(url: str, key: str, offset: int, target: memoryview) -> None:
    """Fill ``target`` from ``offset`` on. A connection that breaks off is taken up again where it broke off."""
    received, problem = 0, "nothing came"
    for _ in range(1 + RESUMPTIONS):
        headers = {"Authorization": f"Bearer {key}", "Range": f"bytes={offset + received}-{offset + len(target) - 1}"}
        try:
            with urlopen(Request(url, headers=headers), timeout=SILENCE) as answer:
                if answer.status != HTTPStatus.PARTIAL_CONTENT:
                    raise FetchError(f"{url}: status {answer.status} instead of a range of bytes")
                while received < len(target):
                    count = answer.readinto(target[received:])
                    if not count:
                        break
                    received += count
            problem = "it broke off"
        except HTTPError as error:  # an answer, and asking again would give the same
            raise FetchError(f"{url}: {error.code} {error.reason}") from error
        except (OSError, HTTPException, ValueError) as error:  # ValueError: it is no URL
            reason = getattr(error, "reason", error)
            problem = str(reason)
            if isinstance(
                reason, TimeoutError
            ):  # whoever says nothing for so long is gone, and is not waited for again
                problem = f"nothing came for {SILENCE:g} s"
                break
        if received == len(target):
            return
    raise FetchError(f"{url}: {received} of {len(target)} bytes at offset {offset}: {problem}")
