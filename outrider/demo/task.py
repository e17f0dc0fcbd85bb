"""The demo's task: add or subtract two numbers from 0 to 99.

A prompt is `47+38=` and its solution the integer in plain decimal, `85`; differences may be negative: `12-40=`
is `-28`. There are 20,000 problems. Each belongs to exactly one split, by a hash of its operation and operands.
`47+38=` and `38+47=` hash alike, and so do `12-40=` and `40-12=`: no split holds a twin of another's problem.
"""

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

Split = Literal["pretrain", "train", "heldout"]
Kind = Literal["addition", "subtraction"]

OPERANDS = range(100)
SIGNS: dict[Kind, str] = {"addition": "+", "subtraction": "-"}
SHARES: dict[Split, int] = {"pretrain": 50, "train": 35, "heldout": 15}
"""Percentage of the problems in each split."""


@dataclass(frozen=True)
class Problem:
    """One question and the only completion, surrounding whitespace aside, that is right."""

    prompt: str
    solution: str
    kind: Kind
    left: int
    right: int


def split_of(kind: Kind, left: int, right: int) -> Split:
    """The split that a problem belongs to, the same in either order of its operands."""
    key = f"{kind} {min(left, right)} {max(left, right)}".encode()
    bucket = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % 100
    for split, share in SHARES.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("the shares of the splits must sum to 100")


@functools.cache
def _all_problems(split: Split) -> tuple[Problem, ...]:
    found = []
    for kind, left, right in itertools.product(get_args(Kind), OPERANDS, OPERANDS):
        if split_of(kind, left, right) == split:
            answer = left + right if kind == "addition" else left - right
            found.append(Problem(f"{left}{SIGNS[kind]}{right}=", str(answer), kind, left, right))
    return tuple(found)


def problems(split: Split, count: int, seed: int) -> list[Problem]:
    """`count` different problems of a split, in an order that depends on the seed alone."""
    if split not in SHARES:
        raise ValueError(f"no split {split!r}: choose one of {', '.join(SHARES)}")
    pool = _all_problems(split)
    if not 0 <= count <= len(pool):
        raise ValueError(f"{count} problems asked of {split!r}, which has {len(pool)}: ask for at most that many")
    return random.Random(seed).sample(pool, count)


def write_jsonl(path: str | Path, problems: Iterable[Problem]) -> None:
    """Write a data set with the columns prompt, solution, kind, left and right, a problem a line."""
    with Path(path).open("w", encoding="utf-8") as file:
        for problem in problems:
            file.write(json.dumps(asdict(problem)) + "\n")
