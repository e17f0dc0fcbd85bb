"""Prompts: read from files or the hub, rendered, tokenized, and dealt out in an order that a seed fixes."""

from __future__ import annotations

import contextlib
import json
import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from outrider.collector.config import DataConfig
from outrider.contract.errors import UserError
from outrider.environments.base import token_array

#: Columns that hold the prompt, in the order in which they are looked for.
PROMPT_COLUMNS = ("prompt", "messages")

_FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready to be sampled. columns: all of its row, by name, for the reward functions."""

    row: int
    text: str
    tokens: array[int]
    columns: Mapping[str, Any]


class OverlongPrompt(Exception):
    """A prompt has more tokens than may be sampled from."""


class PromptSet:
    """A dataset and the way from one of its rows to a :class:`Prompt`."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], source: str, tokenizer: Any,
                 data: DataConfig, limit: int) -> None:  # fmt: skip
        """limit: most tokens of a prompt. Raises UserError when there is no prompt column, or no row."""
        self.rows, self.tokenizer, self.data, self.limit = rows, tokenizer, data, limit
        column = next((name for name in PROMPT_COLUMNS if name in columns), None)
        if column is None:
            raise UserError(
                f"--dataset {source}: no column 'prompt' or 'messages'; its columns are {', '.join(columns)}"
            )
        if len(rows) == 0:
            raise UserError(f"--dataset {source}: has no rows")
        self.column = column
        self._read: dict[int, Mapping[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, row: int, ahead: Callable[[], Sequence[int]] | None = None) -> Prompt:
        """Render and tokenize one row. ahead: gives this row and those that will be asked for next, which are read with
        it. Raises OverlongPrompt, or UserError for a prompt of a wrong type."""
        if ahead is not None and row not in self._read:
            self._read_ahead(ahead())
        try:
            columns = self._read.pop(row, None) or self.rows[row]
        except (ValueError, OSError) as error:  # text that is not UTF-8, a file that has gone
            raise UserError(f"row {row} of the dataset: cannot be read: {error}") from error
        text, tokens = self._render(columns[self.column], row)
        if len(tokens) > self.limit:
            raise OverlongPrompt(f"row {row}: prompt of {len(tokens)} tokens, at most {self.limit} fit")
        if not tokens:
            raise UserError(f"row {row} of the dataset: the prompt is empty")
        return Prompt(row, text, token_array(tokens), columns)

    def _read_ahead(self, rows: Sequence[int]) -> None:
        """Read several rows at once, where the dataset can: one by one each costs several times as much."""
        several = getattr(self.rows, "__getitems__", None)
        if several is not None:
            with contextlib.suppress(ValueError, OSError):  # told when it is the turn of the row that is at fault
                self._read = dict(zip(rows, several(list(rows)), strict=True))

    def check(self) -> None:
        """Look at the first row now, so that what is wrong with all rows is known before anything starts."""
        with contextlib.suppress(OverlongPrompt):
            self.get(0)

    def fingerprint(self) -> str:
        """Hash of the number of rows and of up to a thousand prompts spread over them."""
        step = max(1, len(self.rows) // 1000)
        digest = xxhash.xxh3_64(str(len(self.rows)).encode())
        for row in range(0, len(self.rows), step):
            digest.update(repr(self.rows[row][self.column]).encode())
        return f"{len(self.rows)} rows, hash {digest.hexdigest()}"

    def _render(self, prompt: object, row: int) -> tuple[str, list[int]]:
        if isinstance(prompt, str):
            if self.data.system is None:
                return prompt, self.tokenizer.encode(prompt)
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, list) or not all(isinstance(m, dict) and "role" in m for m in prompt):
            raise UserError(
                f"row {row} of the dataset: column {self.column!r} holds {type(prompt).__name__}; needed is a "
                "string or a list of messages {role, content}"
            )
        messages = list(prompt)
        # A conversation that already ends with the answer is asked up to that answer.
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if self.data.system is not None and not any(m["role"] == "system" for m in messages):
            messages.insert(0, {"role": "system", "content": self.data.system})
        options = {} if self.data.enable_thinking is None else {"enable_thinking": self.data.enable_thinking}
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        except Exception as error:  # a template is a program of the model's author
            raise UserError(f"row {row} of the dataset: the tokenizer's chat template refuses it: {error}") from error
        return text, self.tokenizer.encode(text, add_special_tokens=False)


class Order:
    """Which row the g-th group asks: a fresh permutation for every epoch, from the seed alone."""

    def __init__(self, count: int, seed: int, shuffle: bool) -> None:
        self.count, self.seed, self.shuffle = count, seed, shuffle
        self._epoch = -1
        self._rows: list[int] = []

    def row(self, group: int) -> int:
        """Row of the dataset for group ``group``."""
        return self.rows(group, 1)[0]

    def rows(self, group: int, most: int) -> list[int]:
        """Rows for ``group`` and those after it, ``most`` at most and no further than its epoch."""
        epoch, place = divmod(group, self.count)
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, list(range(self.count))
            if self.shuffle:
                random.Random(f"{self.seed}/{epoch}").shuffle(self._rows)
        return self._rows[place : place + most]


def load_rows(sources: Sequence[str], flag: str) -> tuple[Any, list[str]]:
    """Read and concatenate datasets. Returns rows (indexable, each a mapping) and the names of their columns.

    Raises UserError naming flag, source and what is wrong with it.
    """
    from datasets import concatenate_datasets  # two seconds that only the collector has to spend

    parts = [_load_one(source, flag) for source in sources]
    try:
        rows = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    except ValueError as error:
        raise UserError(f"{flag} {' '.join(sources)}: the datasets do not fit together: {error}") from error
    return rows, list(rows.column_names)


def _load_one(source: str, flag: str) -> Any:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    path = Path(source)
    try:
        if path.is_file():
            if path.suffix not in _FILE_FORMATS:
                known = ", ".join(_FILE_FORMATS)
                raise UserError(f"{flag} {source}: files may be {known}; this one is {path.suffix or 'without ending'}")
            if path.stat().st_size == 0:
                raise UserError(f"{flag} {source}: the file is empty")
            loaded = load_dataset(_FILE_FORMATS[path.suffix], data_files=str(path), split="train")
        elif path.is_dir():
            saved = (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()
            loaded = load_from_disk(str(path)) if saved else load_dataset(str(path))
        elif path.suffix in _FILE_FORMATS or source.startswith((".", "/", "~")):
            raise UserError(f"{flag} {source}: there is no such file or directory")
        else:
            loaded = load_dataset(source)
    except (DatasetGenerationError, DatasetNotFoundError, OSError, ValueError) as error:
        if "corresponds to no data" in str(error):
            raise UserError(f"{flag} {source}: has no rows") from error
        reason = _broken_line(path) or str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"{flag} {source}: cannot be read: {reason}") from error
    if isinstance(loaded, DatasetDict):
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    assert isinstance(loaded, Dataset)
    return loaded


def _broken_line(path: Path) -> str | None:
    """The first line of a .jsonl file that is not JSON, in words; None for other files and where there is none."""
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                json.loads(line)
            except ValueError as error:
                if line.strip():
                    return f"line {number} is not JSON ({error}): {line.strip()[:80].decode(errors='replace')}"
    return None


def split_rows(rows: Any, ratio: float, seed: int) -> tuple[Any, Any]:
    """Hold out a share of the rows. Returns (train, held out)."""
    parts = rows.train_test_split(test_size=ratio, seed=seed)
    return parts["train"], parts["test"]
