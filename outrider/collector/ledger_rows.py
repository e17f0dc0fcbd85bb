"""Rows of the ledger, and what they are to a resumed run and to a reader."""

import contextlib
import itertools
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from outrider.collector.groups import Group
from outrider.contract.arrays import FloatArray, IntArray
from outrider.contract.errors import UserError
from outrider.contract.generation import VersionSpan
from outrider.contract.rollouts import RolloutRow
from outrider.environments.base import Rollout, logprob_array, token_array

#: Name of the fact that says how many steps, from the first one on, are in the archive alone.
ARCHIVED = "archived_steps"


class Row(NamedTuple):
    """One rollout with what is known of its group, as the database has it. Steps count from 0.

    advantages: JSON list, of the whole group, None until it is trained. versions: MessagePack. rewards: JSON object by
    function.
    """

    group: int
    state: str
    step: int | None
    reason: str | None
    deadline: int
    prompt: str
    prompt_tokens: IntArray
    advantages: str | None
    place: int
    tokens: IntArray
    logprobs: FloatArray
    versions: bytes
    mask: bytes | None
    text: str
    finish_reason: Any
    server: str
    reward: float | None
    rewards: str


def select_rows(db: sqlite3.Connection, condition: str, values: Sequence[int] = ()) -> list[Row]:
    """Rollouts in the order of their groups, then of their places. condition: SQL on ``g``, the group."""
    query = (
        "SELECT g.id, g.state, g.step, g.reason, g.deadline, g.prompt, g.prompt_tokens, g.advantages, r.place, "
        "r.tokens, r.logprobs, r.versions, r.mask, r.text, r.finish_reason, r.server, r.reward, r.rewards "
        f"FROM groups g JOIN rollouts r ON r.group_id = g.id WHERE {condition} ORDER BY g.id, r.place"
    )
    return [Row(*row) for row in db.execute(query, values)]


def archived_steps(db: sqlite3.Connection) -> int:
    """How many steps, from the first one on, are in the archive alone."""
    [steps] = db.execute("SELECT max(CAST(value AS INTEGER)) FROM facts WHERE name = ?", (ARCHIVED,)).fetchone()
    return steps or 0


def held_steps(db: sqlite3.Connection) -> int:
    """How many steps, from the first one on and without a gap, are in the ledger or its archive."""
    held = archived_steps(db)
    for (step,) in db.execute("SELECT DISTINCT step FROM groups WHERE step >= ? ORDER BY step", (held,)):
        if step != held:
            break
        held += 1
    return held


def groups_of(rows: Iterable[Row]) -> list[Group]:
    """Whole groups, of rows in order."""
    return [_group(list(own)) for _, own in itertools.groupby(rows, key=lambda row: row.group)]


def _group(rows: list[Row]) -> Group:
    first = rows[0]
    group = Group(first.group, first.deadline, first.prompt, [], [], {}, json.loads(first.advantages or "[]"))
    prompt = token_array(first.prompt_tokens)
    for row in rows:
        group.rollouts.append(
            Rollout(
                prompt=prompt,
                tokens=token_array(row.tokens),
                logprobs=logprob_array(row.logprobs),
                versions=decode_versions(row.versions),
                text=row.text,
                finish_reason=row.finish_reason,
                server=row.server,
                mask=row.mask,
            )
        )
        group.rewards.append(row.reward)  # type: ignore[arg-type]  # None only where the group was dropped
        for name, value in json.loads(row.rewards).items():
            group.per_function.setdefault(name, []).append(value)
    return group


def readable(row: Row) -> RolloutRow:
    """A row for people."""
    return RolloutRow(
        group=row.group,
        index=row.place,
        step=None if row.step is None else row.step + 1,
        state=row.state,
        reason=row.reason,
        prompt=row.prompt,
        completion=row.text,
        tokens=len(row.tokens) // 4,
        reward=row.reward,
        rewards=json.loads(row.rewards),
        advantage=json.loads(row.advantages)[row.place] if row.advantages else None,
        finish_reason=row.finish_reason,
        versions=decode_versions(row.versions),
        server=row.server,
    )


def decode_versions(data: bytes) -> list[VersionSpan]:
    """The versions of a row."""
    return msgspec.msgpack.decode(data, type=list[VersionSpan])


@contextlib.contextmanager
def open_for_reading(path: Path) -> Iterator[sqlite3.Connection]:
    """The ledger at ``path``, while a run may be writing it. Raises UserError, also for errors inside."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            yield db
    except sqlite3.Error as error:
        raise UserError(f"ledger {path}: cannot be read: {error}") from error
