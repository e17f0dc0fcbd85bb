"""Prompts from every kind of file, and what is said of files that are wrong."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from outrider.collector.config import DataConfig
from outrider.collector.prompts import Order, OverlongPrompt, PromptSet, load_rows
from outrider.contract.errors import UserError

pytestmark = pytest.mark.usefixtures("_own_datasets_cache")

ROWS = [{"prompt": f"{number}+1=", "solution": str(number + 1)} for number in range(5)]


def write(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def prompt_set(tokenizer: Any, *sources: str, limit: int = 100, **data: Any) -> PromptSet:
    rows, columns = load_rows(sources, "--dataset")
    return PromptSet(rows, columns, " ".join(sources), tokenizer, DataConfig(dataset=sources, **data), limit)


def saved(kind: str, directory: Path) -> str:
    """ROWS in a form that ``--dataset`` takes."""
    table = Dataset.from_list(ROWS)
    path = directory / f"data.{kind}"
    match kind:
        case "jsonl":
            return write(path, *ROWS)
        case "json":
            path.write_text(json.dumps(ROWS))
        case "csv":
            table.to_csv(path)
        case "parquet":
            table.to_parquet(path)
        case "saved":
            table.save_to_disk(path)
        case "saved_splits":
            DatasetDict({"test": table.select([0]), "train": table}).save_to_disk(path)
        case "folder":
            path.mkdir()
            write(path / "train.jsonl", *ROWS)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved", "saved_splits", "folder"])
def test_every_form_gives_the_same_prompts(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    prompts = prompt_set(tokenizer, saved(kind, tmp_path))
    assert len(prompts) == 5
    found = prompts.get(3)
    assert (found.row, found.text) == (3, "3+1=")
    assert tokenizer.decode(found.tokens) == "3+1="
    assert str(found.columns["solution"]) == "4"


def test_several_sources_are_one_dataset(tmp_path: Path, tokenizer: Any) -> None:
    more = write(tmp_path / "more.jsonl", {"prompt": "9-9=", "solution": "0"})
    prompts = prompt_set(tokenizer, saved("jsonl", tmp_path), more)
    assert len(prompts) == 6
    assert prompts.get(5).text == "9-9="
    with pytest.raises(UserError, match="the datasets do not fit together"):
        prompt_set(tokenizer, more, write(tmp_path / "odd.jsonl", {"prompt": [{"role": "user", "content": "1"}]}))


USER = {"role": "user", "content": "1+1="}
ANSWER = {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "S:"}


@pytest.mark.parametrize(
    ("row", "system", "text"),
    [
        ({"prompt": "1+1="}, None, "1+1="),
        ({"prompt": "1+1="}, "T:", "T:1+1="),
        ({"prompt": [USER]}, None, "1+1="),
        ({"messages": [USER]}, "T:", "T:1+1="),
        ({"messages": [SYSTEM, USER]}, "T:", "S:1+1="),
        ({"messages": [USER, ANSWER]}, None, "1+1="),
        ({"messages": [USER, ANSWER, USER]}, None, "1+1=21+1="),
        ({"messages": [ANSWER], "prompt": "1+1="}, None, "1+1="),
    ],
)
def test_strings_and_chats(row: dict[str, Any], system: str | None, text: str, tmp_path: Path, tokenizer: Any) -> None:
    """A chat that ends with the answer is asked up to it; a system message is added where there is none."""
    prompt = prompt_set(tokenizer, write(tmp_path / "data.jsonl", row), system=system).get(0)
    assert prompt.text == text
    assert tokenizer.decode(prompt.tokens) == text


def test_overlong_prompts_are_rejected_one_by_one(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "data.jsonl", *({"prompt": "1" * length} for length in (12, 3, 11, 10)))
    prompts = prompt_set(tokenizer, path, limit=10)
    prompts.check()  # the first row is too long, which says nothing of the others
    assert [len(prompts.get(row).tokens) for row in (1, 3)] == [3, 10]
    for row, length in ((0, 12), (2, 11)):
        with pytest.raises(OverlongPrompt, match=f"row {row}: prompt of {length} tokens, at most 10 fit"):
            prompts.get(row)


def broken_files(directory: Path) -> dict[str, tuple[str, str]]:
    """Name of a fault → file and what has to be said of it."""
    fine = json.dumps(ROWS[0])
    junk = directory / "junk.parquet"
    junk.write_bytes(b"junk" * 100)
    latin = directory / "latin.jsonl"
    latin.write_bytes('{"prompt": "ä"}\n'.encode("latin1"))
    (directory / "bare").mkdir()
    (directory / "empty.jsonl").touch()
    return {
        "no prompt": (
            write(directory / "a.jsonl", {"question": "1", "solution": "2"}),
            "columns are question, solution",
        ),
        "empty": (str(directory / "empty.jsonl"), "the file is empty"),
        "blank": (write(directory / "blank.jsonl", "", ""), "has no rows"),
        "header only": (write(directory / "head.csv", "prompt,solution"), "has no rows"),
        "broken line": (
            write(directory / "b.jsonl", fine, '{"prompt": "1+'),
            r'line 2 is not JSON .*: {"prompt": "1\+',
        ),
        "not JSON": (write(directory / "c.jsonl", fine, fine, "hello"), r"line 3 is not JSON .*: hello"),
        "missing": (str(directory / "nothing.jsonl"), "no such file or directory"),
        "junk": (str(junk), "cannot be read: Parquet magic bytes"),
        "ending": (write(directory / "data.txt", "1+1="), r"files may be \.jsonl.*this one is \.txt"),
        "nothing inside": (str(directory / "bare"), "doesn't contain any data files"),
        "number": (write(directory / "n.csv", "prompt,solution", "11,2"), "column 'prompt' holds int; needed is a str"),
        "null": (write(directory / "o.jsonl", {"prompt": None}), "holds NoneType"),
        "list": (write(directory / "l.jsonl", {"prompt": ["1+1="]}), "holds list; needed is a string or a list of mes"),
        "no text": (write(directory / "e.jsonl", {"prompt": ""}), "row 0 of the dataset: the prompt is empty"),
        "no messages": (write(directory / "m.jsonl", {"messages": []}), "chat template refuses it"),
        "no UTF-8": (str(latin), "row 0 of the dataset: cannot be read: 'utf-8'"),
    }


FAULTS = [
    "no prompt", "empty", "blank", "header only", "broken line", "not JSON", "missing", "junk", "ending",
    "nothing inside", "number", "null", "list", "no text", "no messages", "no UTF-8",
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_said_of_a_wrong_file(fault: str, tmp_path: Path, tokenizer: Any) -> None:
    """Before anything starts, and so that the user finds the place."""
    path, reason = broken_files(tmp_path)[fault]
    with pytest.raises(UserError, match=reason) as caught:
        prompt_set(tokenizer, path).check()
    if not str(caught.value).startswith("row "):
        assert str(caught.value).startswith(f"--dataset {path}")


def test_a_template_that_fails_is_the_users_error(tmp_path: Path, tokenizer: Any) -> None:
    """Templates are programs: they raise errors of their own when a conversation is not to their taste."""
    picky = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    picky.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"row 0 .* template refuses it: roles must alternate"):
        prompt_set(picky, write(tmp_path / "data.jsonl", {"messages": [USER]})).check()


@given(count=st.integers(1, 60), seed=st.integers(0, 2**32), groups=st.lists(st.integers(0, 400), max_size=30))
def test_order_is_a_permutation_of_every_epoch(count: int, seed: int, groups: Sequence[int]) -> None:
    """The row of a group follows from seed and number alone, in whatever order groups are asked for."""
    order, other = Order(count, seed, True), Order(count, seed, True)
    epochs = [[order.row(epoch * count + place) for place in range(count)] for epoch in range(3)]
    assert all(sorted(rows) == list(range(count)) for rows in epochs)
    jumps = {group: other.row(group) for group in groups}
    assert all(order.row(group) == row for group, row in jumps.items())
    assert [Order(count, seed, False).row(group) for group in range(2 * count)] == [*range(count)] * 2


@given(count=st.integers(1, 20), start=st.integers(0, 60), most=st.integers(1, 30))
def test_rows_ahead_are_those_of_the_next_groups(count: int, start: int, most: int) -> None:
    order = Order(count, 3, True)
    rows = order.rows(start, most)
    assert 1 <= len(rows) <= most
    assert rows == [Order(count, 3, True).row(start + ahead) for ahead in range(len(rows))]
    assert len(rows) == most or (start + len(rows)) % count == 0


def test_reading_ahead_changes_nothing(tmp_path: Path, tokenizer: Any) -> None:
    """Whether rows come in the order that was foretold or not."""
    path = write(tmp_path / "data.jsonl", *ROWS)
    plain, ahead = prompt_set(tokenizer, path), prompt_set(tokenizer, path)
    for row, foretold in [(3, [3, 0]), (0, [0, 4]), (2, [2, 1, 4]), (1, [1]), (1, [1, 2]), (4, [4])]:
        assert ahead.get(row, lambda rows=foretold: rows) == plain.get(row)


def test_epochs_and_seeds_differ() -> None:
    orders = [
        [Order(50, seed, True).row(50 * epoch + place) for place in range(50)] for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len({tuple(rows) for rows in orders}) == 4


def test_fingerprint_changes_with_the_data(tmp_path: Path, tokenizer: Any) -> None:
    def fingerprint(name: str, rows: list[dict[str, str]]) -> str:
        return prompt_set(tokenizer, write(tmp_path / name, *rows)).fingerprint()

    first = fingerprint("a.jsonl", ROWS)
    assert first == fingerprint("b.jsonl", ROWS), "the name of the file is not part of the data"
    assert first != fingerprint("c.jsonl", ROWS[:-1])
    assert first != fingerprint("d.jsonl", ROWS[::-1])
    assert first != fingerprint("e.jsonl", [*ROWS[:-1], {"prompt": "7+7=", "solution": "14"}])
