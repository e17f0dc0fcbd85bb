"""What passes between the front and vLLM's workers: orders and reports, as small files in a directory of the server's.

A collective RPC reaches every worker of every data-parallel engine, but brings back the answers of one engine only.
So the workers leave their answers here, one file each, and the front waits until it has one of every worker.
"""

import asyncio
import os
import time
from pathlib import Path
from typing import TypeVar

import msgspec

from outrider.contract.manifest import DTypeName

#: Seconds between two looks at the directory: at first, and at most, which a wait of seconds comes to.
_INTERVAL, _LONGEST_INTERVAL = 0.002, 0.02


class Part(msgspec.Struct, frozen=True):
    """Bytes of a tensor: ``length`` of them at ``offset`` of the file ``path``, which can be mapped."""

    path: str
    offset: int
    length: int


class TensorSource(msgspec.Struct, frozen=True):
    """A tensor by its Hugging Face name, the concatenation of its parts."""

    name: str
    dtype: DTypeName
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


class PrepareOrder(msgspec.Struct, frozen=True):
    """Make room for a second set of weights. number: of the order, for its reports. host: in host memory. dtype,
    shapes: of what will be published, by Hugging Face's names."""

    number: int
    host: bool
    dtype: DTypeName
    shapes: dict[str, tuple[int, ...]]


class StageOrder(msgspec.Struct, frozen=True):
    """Copy this version beside the weights in use. number: of the order, for its reports."""

    number: int
    version: int
    tensors: tuple[TensorSource, ...]


class Report(msgspec.Struct, kw_only=True):
    """A worker's answer to order ``number``. engine, rank: who it is. error: why not. seconds: that it took."""

    number: int
    engine: int
    rank: int
    error: str | None = None
    seconds: float = 0.0


class PrepareReport(Report, kw_only=True):
    """ranks: how many workers its engine has, by its own account."""

    ranks: int = 0


class StageReport(Report, kw_only=True):
    """known_copies: whether it has done without vLLM's own loading, by the copies that this comes to."""

    known_copies: bool = False


class ProgressReport(Report, kw_only=True):
    """progress: for each request the tokens that have been sampled, from the engine's first worker; it lists no
    requests that have not got so far as to be run."""

    progress: dict[str, int] | None = None


class CommitReport(ProgressReport, kw_only=True):
    """began: when it began, of ``time.monotonic``, which is where the progress was. cleared: keys and values are gone,
    those of all requests, since the weights until then were not finite."""

    began: float = 0.0
    cleared: bool = False


AnyReport = TypeVar("AnyReport", bound=Report)


def write_order(directory: Path, order: StageOrder) -> Path:
    """Lay down an order, in a file of its own: who comes late must not read the next one."""
    for old in sorted(directory.glob("stage-*.order"))[:-4]:
        old.unlink(missing_ok=True)
    path = directory / f"stage-{order.number:09d}.order"
    _write(path, msgspec.json.encode(order))
    return path


def read_order(path: Path) -> StageOrder:
    """What :func:`write_order` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=StageOrder)


def write_report(directory: Path, kind: str, report: Report) -> None:
    """Lay down a worker's answer; the file replaces its last one of this kind."""
    _write(directory / f"{kind}-{report.engine}-{report.rank}.report", msgspec.json.encode(report))


async def all_reports(
    directory: Path, kind: str, number: int, count: int, deadline: float, type: type[AnyReport]
) -> list[AnyReport]:
    """The answers of all ``count`` workers to order ``number``. Raises TimeoutError, saying who has not answered."""
    end = time.monotonic() + deadline
    found: dict[Path, AnyReport] = {}
    interval = _INTERVAL
    while True:
        for path, report in _reports(directory, kind, type):
            if report.number == number:
                found[path] = report
        if len(found) >= count:
            return list(found.values())
        if time.monotonic() > end:
            heard = ", ".join(sorted(f"engine {r.engine} rank {r.rank}" for r in found.values())) or "nobody"
            raise TimeoutError(f"{len(found)} of {count} workers have answered within {deadline:g} s ({heard})")
        await asyncio.sleep(interval)
        interval = min(1.05 * interval, _LONGEST_INTERVAL)


def _reports(directory: Path, kind: str, type: type[AnyReport]) -> list[tuple[Path, AnyReport]]:
    paths = directory.glob(f"{kind}-*.report")
    return [(path, msgspec.json.decode(path.read_bytes(), type=type)) for path in paths]


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)
