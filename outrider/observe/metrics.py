"""``metrics.jsonl``: one row a line, written as it happens, read back by the report and by ``outrider show``."""

import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from outrider.contract.errors import UserError
from outrider.observe.records import EvalRecord, MetricsRow, StepRecord


class MetricsWriter:
    """Appends rows to ``path``. Each row is flushed, so a killed run keeps every row it has logged."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._cut_torn_line()
        self._file = path.open("ab", buffering=0)
        self._encoder = msgspec.json.Encoder()

    def write(self, row: MetricsRow) -> None:
        """Append one row. Values that are not finite become null, which ``read_metrics`` reads as nan. Raises
        UserError."""
        line = self._encoder.encode(row) + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}; free space there, then go on with "
                "--resume_from_checkpoint auto"
            ) from error

    def close(self) -> None:
        """Close the file; closing twice does no harm."""
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _cut_torn_line(self) -> None:
        # A killed run may have left half a line, to which the first row of the resumed run would be glued.
        with self.path.open("ab+") as file:
            file.seek(0)
            complete = sum(len(line) for line in file if line.endswith(b"\n"))
            if file.seek(0, os.SEEK_END) > complete:
                file.truncate(complete)


def read_metrics(path: Path) -> list[MetricsRow]:
    """The rows of the run in order of writing, as if it had never been interrupted.

    A torn last line is left out. A resumed run goes back to its checkpoint and logs the steps from there on
    again: the later row of a (kind, step) is the one that counts, and rows of steps that the run went back
    behind and has not reached again are of weights that no longer exist, so they are left out too.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read the metrics {path}: {error.strerror}. A run writes them after its first step"
        ) from error
    rows: dict[tuple[type, int], MetricsRow] = {}
    newest = 0
    for number, line in enumerate(text.split(b"\n")[:-1], start=1):
        row = _decode(line, path, number)
        if isinstance(row, StepRecord):
            if row.step <= newest:
                rows = {key: kept for key, kept in rows.items() if kept.step < row.step}
            newest = row.step
        rows.pop((type(row), row.step), None)
        rows[type(row), row.step] = row
    return list(rows.values())


def steps_of(rows: list[MetricsRow]) -> list[StepRecord]:
    """The optimizer steps among ``rows``."""
    return [row for row in rows if isinstance(row, StepRecord)]


def evaluations_of(rows: list[MetricsRow]) -> list[EvalRecord]:
    """The evaluations among ``rows``."""
    return [row for row in rows if isinstance(row, EvalRecord)]


def _decode(line: bytes, path: Path, number: int) -> MetricsRow:
    try:
        return msgspec.convert(_null_to_nan(msgspec.json.decode(line)), StepRecord | EvalRecord)
    except msgspec.MsgspecError as error:
        raise UserError(
            f"{path}, line {number}, is not a row of metrics: {error}. Remove the line, or start in a new directory"
        ) from error


def _null_to_nan(value: Any) -> Any:
    # JSON has no nan. No field of a row is optional, so a null can only have been one.
    if isinstance(value, dict):
        return {key: _null_to_nan(item) for key, item in value.items()}
    return math.nan if value is None else value
