"""Steps that have left the ledger: a Parquet file for each, beside it.

A file has one row a rollout: those that the step trained, and those of groups that were dropped by then. Its columns
are typed, so that other programs can read them, and complete, so that a run can go on with them. It appears whole, by
being renamed, and may be written again.
"""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from pyarrow import parquet

from outrider.collector.ledger_rows import Row, decode_versions
from outrider.contract.disk import synchronize
from outrider.contract.errors import UserError

_TOKENS, _LOGPROBS = pa.list_(pa.int32()), pa.list_(pa.float32())
_VERSIONS = pa.list_(pa.struct([("version", pa.int64()), ("tokens", pa.int64())]))
_REWARDS = pa.map_(pa.string(), pa.float64())


class Archive:
    """The files of one run. Steps count from 0 here, as in the ledger, and from 1 in names and contents of files."""

    def __init__(self, ledger: Path) -> None:
        """ledger: path of the SQLite file."""
        self.directory = ledger.with_name("rollouts")

    def path(self, step: int) -> Path:
        """The file of a step, whether it is there or not."""
        return self.directory / f"step-{step + 1:08d}.parquet"

    def steps(self) -> list[int]:
        """Steps that have a file, in order."""
        names = (path.stem.removeprefix("step-") for path in self.directory.glob("step-*.parquet"))
        return sorted(int(name) - 1 for name in names if name.isdigit())

    def write(self, step: int, rows: list[Row]) -> None:
        """Put a file on disk, in the place of one that is there. Raises OSError, pyarrow.ArrowException."""
        self.directory.mkdir(exist_ok=True)
        path = self.path(step)
        unfinished = path.with_suffix(".unfinished")
        try:
            parquet.write_table(_table(rows), unfinished, compression="zstd")
            synchronize(unfinished)
            unfinished.replace(path)
            synchronize(self.directory)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    def read(self, step: int) -> list[Row]:
        """The rows of a file. Raises UserError when it is missing or broken."""
        path = self.path(step)
        try:
            return _rows(parquet.ParquetFile(path).read())
        except (OSError, pa.ArrowException, KeyError) as error:
            raise UserError(
                f"{path}: the rollouts of step {step + 1} were moved there from the ledger and cannot be read: "
                f"{str(error).splitlines()[0]}; put the file back"
            ) from error


def _table(rows: list[Row]) -> pa.Table:
    versions = [
        [{"version": version, "tokens": tokens} for version, tokens in decode_versions(row.versions)] for row in rows
    ]
    return pa.table(
        {
            "step": pa.array([None if row.step is None else row.step + 1 for row in rows], pa.int64()),
            "group": pa.array([row.group for row in rows], pa.int64()),
            "index": pa.array([row.place for row in rows], pa.int64()),
            "state": pa.array([row.state for row in rows], pa.string()),
            "reason": pa.array([row.reason for row in rows], pa.string()),
            "deadline": pa.array([row.deadline for row in rows], pa.int64()),
            "prompt": pa.array([row.prompt for row in rows], pa.string()),
            "prompt_tokens": _lists([row.prompt_tokens for row in rows], "<i4", _TOKENS),
            "completion": pa.array([row.text for row in rows], pa.string()),
            "tokens": _lists([row.tokens for row in rows], "<i4", _TOKENS),
            "logprobs": _lists([row.logprobs for row in rows], "<f4", _LOGPROBS),
            "mask": pa.array([row.mask for row in rows], pa.binary()),  # a byte a token; null: all were sampled
            "versions": pa.array(versions, _VERSIONS),
            "finish_reason": pa.array([row.finish_reason for row in rows], pa.string()),
            "server": pa.array([row.server for row in rows], pa.string()),
            "reward": pa.array([row.reward for row in rows], pa.float64()),
            "rewards": pa.array([list(json.loads(row.rewards).items()) for row in rows], _REWARDS),
            "advantage": pa.array(
                [json.loads(row.advantages)[row.place] if row.advantages else None for row in rows], pa.float64()
            ),
        }
    )


def _rows(table: pa.Table) -> list[Row]:
    plain = {name: table[name].to_pylist() for name in table.column_names if name not in _ARRAYS}
    arrays = {name: _bytes(table[name]) for name in _ARRAYS}
    advantages: dict[int, list[float]] = {}
    for group, advantage in zip(plain["group"], plain["advantage"], strict=True):
        if advantage is not None:
            advantages.setdefault(group, []).append(advantage)
    encoded = {group: json.dumps(values) for group, values in advantages.items()}
    return [
        Row(
            group=group,
            state=plain["state"][at],
            step=None if plain["step"][at] is None else plain["step"][at] - 1,
            reason=plain["reason"][at],
            deadline=plain["deadline"][at],
            prompt=plain["prompt"][at],
            prompt_tokens=arrays["prompt_tokens"][at],
            advantages=encoded.get(group),
            place=plain["index"][at],
            tokens=arrays["tokens"][at],
            logprobs=arrays["logprobs"][at],
            versions=msgspec.msgpack.encode([(span["version"], span["tokens"]) for span in plain["versions"][at]]),
            mask=plain["mask"][at],
            text=plain["completion"][at],
            finish_reason=plain["finish_reason"][at],
            server=plain["server"][at],
            reward=plain["reward"][at],
            rewards=msgspec.json.encode(dict(plain["rewards"][at])).decode(),
        )
        for at, group in enumerate(plain["group"])
    ]


#: Columns that never become Python objects by the token.
_ARRAYS = ("prompt_tokens", "tokens", "logprobs")


def _lists(values: Iterable[bytes], dtype: str, kind: pa.DataType) -> pa.ListArray:
    """A column of lists, of raw 4-byte numbers."""
    parts = list(values)
    ends = np.cumsum([0, *(len(part) // 4 for part in parts)], dtype=np.int32)
    flat = pa.array(np.frombuffer(b"".join(parts), dtype))
    return pa.ListArray.from_arrays(pa.array(ends), flat, type=kind)


def _bytes(column: Any) -> list[bytes]:
    """The inverse of :func:`_lists`."""
    found = []
    for chunk in column.chunks:
        values, ends = chunk.values.to_numpy(), chunk.offsets.to_numpy()
        found += [values[start:end].tobytes() for start, end in itertools.pairwise(ends)]
    return found
