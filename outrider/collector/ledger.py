"""The durable record of every group: a SQLite file in the run's directory.

A group's row is written when it is finished or given up, and its step when its batch ships, before the trainer
gets it. A run that ends anywhere can therefore be taken up again: steps that were trained after the last checkpoint
are replayed with the same rollouts, finished groups that had not been trained are used, and what was in flight is
started anew. Group g asks row ``Order.row(g)`` of the dataset, so the largest id is the data cursor.

Old steps leave it for the archive, see ``pruning``; which groups these were it still knows.
"""

import fcntl
import json
import sqlite3
import threading
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from outrider.collector.archive import Archive
from outrider.collector.groups import Group
from outrider.collector.ledger_rows import (
    ARCHIVED,
    Row,
    archived_steps,
    groups_of,
    held_steps,
    open_for_reading,
    readable,
    select_rows,
)
from outrider.contract.arrays import pack_floats, pack_ints
from outrider.contract.errors import UserError
from outrider.contract.rollouts import RolloutRow

_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS groups (
    id INTEGER PRIMARY KEY, state TEXT NOT NULL CHECK (state IN ('finished', 'trained', 'dropped')),
    step INTEGER, reason TEXT, deadline INTEGER, prompt TEXT NOT NULL, prompt_tokens BLOB NOT NULL, advantages TEXT);
CREATE TABLE IF NOT EXISTS rollouts (
    group_id INTEGER NOT NULL REFERENCES groups (id), place INTEGER NOT NULL, tokens BLOB NOT NULL,
    logprobs BLOB NOT NULL, versions BLOB NOT NULL, mask BLOB, text TEXT NOT NULL, finish_reason TEXT NOT NULL,
    server TEXT NOT NULL, reward REAL, rewards TEXT NOT NULL, PRIMARY KEY (group_id, place));
CREATE TABLE IF NOT EXISTS archived (first INTEGER PRIMARY KEY, last INTEGER NOT NULL UNIQUE);
CREATE INDEX IF NOT EXISTS groups_by_step ON groups (step);
CREATE INDEX IF NOT EXISTS dropped_by_deadline ON groups (deadline) WHERE state = 'dropped';
"""

#: Seconds that a write may wait for others. A thread that wakes for every group costs more than its writes do.
LINGER = 0.02
#: Of the tables above; kept in the file, so that one of another layout is refused by name.
_LAYOUT = 3
#: A rollout is several kilobytes: with pages of SQLite's usual 4 it costs twice the CPU time. The log is written back
#: every so many pages, which is when the disk is waited for.
_PAGE_BYTES, _CHECKPOINT_PAGES = 32768, 2000
#: Name of the fact by which checkpoints know their ledger.
ID = "id"


class Backlog(msgspec.Struct):
    """What a ledger holds for a run that goes on from a step.

    replays: step → its groups, for steps from that one on. finished: not trained yet. missing: group ids that were
    in flight. next_group: the first id never started.
    """

    replays: dict[int, list[Group]]
    finished: list[Group]
    missing: list[int]
    next_group: int


class Ledger:
    """Writes on a thread of its own, so that a slow disk never holds up a rollout. What is handed over within
    ``LINGER`` seconds goes into one transaction, unless somebody waits for it.

    Once a write has failed, all later ones fail as it did: who waits for any of them hears of it.
    """

    def __init__(self, path: Path, facts: dict[str, str], resume: bool) -> None:
        """facts: what must be the same for a run to go on (dataset, group size...). Raises UserError when the file
        is of another run, cannot be written, or is in the way of a new run."""
        self.path, self.archive = path, Archive(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._outstanding: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._scheduled = False
        self._urgent = threading.Event()
        self._broken: Exception | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path)
            self._db = self._thread.submit(_open, path).result()
            known = self._thread.submit(lambda: dict(self._db.execute("SELECT name, value FROM facts"))).result()
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"ledger {path}: cannot be written: {error}") from error
        if known and not resume:
            raise UserError(
                f"--output_dir {path.parent} holds another run's ledger: choose another directory, or go on with that "
                "run by --resume_from_checkpoint auto"
            )
        if not known and self.archive.steps():
            raise UserError(
                f"{self.archive.directory} holds rollouts of another run: choose another --output_dir, or move "
                "them away"
            )
        # A fact that an earlier version did not keep is taken as it is now.
        changed = [name for name, value in facts.items() if known.get(name, value) != value]
        if changed:
            name = changed[0]
            raise UserError(
                f"ledger {path} is of a run with {name} {known[name]}; this one has {facts[name]}: "
                "resume with the same settings, or choose another --output_dir"
            )
        #: Of this ledger and its copies alone.
        self.id = known.get(ID) or uuid.uuid4().hex
        keep, kept = "INSERT OR IGNORE INTO facts VALUES (?, ?)", {**facts, ID: self.id}
        self._submit(lambda: self._db.executemany(keep, kept.items()), urgent=True).result()

    def finished(self, group: Group) -> "Future[Any]":
        """Record a group that waits for its batch."""
        return self._submit(lambda: self._insert(group, "finished", None))

    def dropped(self, group_id: int, reason: str, group: Group | None = None) -> "Future[Any]":
        """Record that a group was given up, with its rollouts where there are any."""

        def write() -> None:
            if group is not None:
                self._insert(group, "dropped", reason)
            else:
                self._db.execute(
                    "INSERT OR REPLACE INTO groups VALUES (?, 'dropped', NULL, ?, NULL, '', x'', NULL)",
                    (group_id, reason),
                )

        return self._submit(write)

    def trained(self, step: int, groups: Sequence[Group]) -> "Future[Any]":
        """Record which groups make up the batch of ``step``, with their advantages."""

        def write() -> None:
            # Advantages are beside the step and not in the rollouts, whose rows would be written once more for them.
            self._db.executemany(
                "UPDATE groups SET state = 'trained', step = ?, advantages = ? WHERE id = ?",
                [(step, json.dumps(group.advantages), group.id) for group in groups],
            )

        return self._submit(write, urgent=True)

    def forget(self, step: int, groups: Collection[int]) -> "Future[Any]":
        """Delete a step, the oldest one, and these groups: the archive has them."""

        def write() -> None:
            for group_id in sorted(groups):
                self._db.execute("DELETE FROM rollouts WHERE group_id = ?", (group_id,))
                self._db.execute("DELETE FROM groups WHERE id = ?", (group_id,))
                _note_archived(self._db, group_id)
            self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (ARCHIVED, str(step + 1)))

        return self._submit(write)

    def backlog(self, start_step: int) -> Backlog:
        """What there is to take up for a run that goes on with ``start_step``. Raises UserError when steps before
        it were never recorded here, or steps that are needed for it are no longer in the archive."""
        return self._thread.submit(lambda: _backlog(self._db, self.archive, start_step)).result()

    def close(self) -> None:
        """Write what is outstanding and close the file."""
        self._urgent.set()
        self._thread.submit(self._db.close).result()
        self._thread.shutdown()
        self._lock.close()

    def _submit(self, write: Callable[[], Any], urgent: bool = False) -> "Future[Any]":
        future: Future[Any] = Future()
        self._outstanding.append((write, future))
        if urgent:
            self._urgent.set()
        if not self._scheduled:
            self._scheduled = True
            self._thread.submit(self._write_outstanding)
        return future

    def _write_outstanding(self) -> None:
        """All that waits, in one transaction."""
        self._urgent.wait(LINGER)
        self._urgent.clear()
        # Before anything is taken: what is handed over from here on schedules another call.
        self._scheduled = False
        writes = [self._outstanding.popleft() for _ in range(len(self._outstanding))]
        try:
            if self._broken is None:
                with self._db:
                    for write, _ in writes:
                        write()
        except sqlite3.Error as error:
            # Remembered: a group that is missing must not go unnoticed because there is space for its step.
            self._broken = UserError(
                f"ledger {self.path}: cannot be written: {error}; free space there, then go on with "
                "--resume_from_checkpoint auto"
            )
        except Exception as error:  # noqa: BLE001 - a defect; those who wait must hear of it, and not wait for ever
            self._broken = error
        for _, future in writes:
            if not future.set_running_or_notify_cancel():
                continue  # whoever waited has gone
            if self._broken is None:
                future.set_result(None)
            else:
                future.set_exception(self._broken)

    def _insert(self, group: Group, state: str, reason: str | None) -> None:
        prompt_tokens = pack_ints(group.rollouts[0].prompt) if group.rollouts else b""
        self._db.execute("DELETE FROM rollouts WHERE group_id = ?", (group.id,))
        self._db.execute(
            "INSERT OR REPLACE INTO groups VALUES (?, ?, NULL, ?, ?, ?, ?, NULL)",
            (group.id, state, reason, group.deadline, group.prompt, prompt_tokens),
        )
        self._db.executemany(
            "INSERT INTO rollouts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    group.id,
                    place,
                    pack_ints(rollout.tokens),
                    pack_floats(rollout.logprobs),
                    msgspec.msgpack.encode(rollout.versions),
                    None if rollout.mask is None else bytes(rollout.mask),
                    rollout.text,
                    rollout.finish_reason,
                    rollout.server,
                    group.rewards[place] if group.rewards else None,
                    msgspec.json.encode({name: values[place] for name, values in group.per_function.items()}).decode(),
                )
                for place, rollout in enumerate(group.rollouts)
            ],
        )


def _lock(path: Path) -> BinaryIO:
    """Keep a second run out of the directory for as long as this process lives. Raises UserError when one is there."""
    file = open(path.with_suffix(".lock"), "ab")  # noqa: SIM115 - open means locked
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(
            f"--output_dir {path.parent}: another run is using it at this moment; wait for its end, stop it, or choose "
            "another directory"
        ) from error
    return file


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False)
    db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")  # before there is anything in it
    db.execute("PRAGMA journal_mode = WAL")
    # A power cut may cost the last moments, a killed process nothing; the file is sound either way.
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
    if not is_empty(db):
        check_layout(path, db)
    db.executescript(_SCHEMA)
    db.execute(f"PRAGMA user_version = {_LAYOUT}")
    return db


def is_empty(db: sqlite3.Connection) -> bool:
    """Whether nothing has been made of the file yet."""
    return db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)


def check_layout(path: Path, db: sqlite3.Connection) -> None:
    """Raises UserError when the tables are those of another version."""
    [layout] = db.execute("PRAGMA user_version").fetchone()
    if layout != _LAYOUT:
        raise UserError(
            f"ledger {path} has layout {layout}, and this version of Outrider writes layout {_LAYOUT}: choose another "
            "--output_dir, or go on with the version that began the run"
        )


def _note_archived(db: sqlite3.Connection, group_id: int) -> None:
    """Add a group to the spans of ids that are in the archive alone."""
    before = db.execute("SELECT first FROM archived WHERE last = ?", (group_id - 1,)).fetchone()
    after = db.execute("SELECT last FROM archived WHERE first = ?", (group_id + 1,)).fetchone()
    first, last = before[0] if before else group_id, after[0] if after else group_id
    db.execute("DELETE FROM archived WHERE first IN (?, ?)", (first, group_id + 1))
    db.execute("INSERT INTO archived VALUES (?, ?)", (first, last))


def _backlog(db: sqlite3.Connection, archive: Archive, start_step: int) -> Backlog:
    if (held := held_steps(db)) < start_step:
        # The cursor of the data is here alone: a run that goes on would ask the same prompts again.
        raise UserError(
            f"{archive.directory.parent}: the run goes on after {start_step} batches, and its ledger has {held} of "
            "them: go on with the ledger of the run that trained them"
        )
    rows = select_rows(db, "g.state = 'finished' OR g.step >= ?", (start_step,))
    replays = _by_step(row for row in rows if row.step is not None)
    for step in range(start_step, archived_steps(db)):
        replays |= _by_step(row for row in archive.read(step) if row.step is not None)
    missing: list[int] = []
    next_group = 0
    for first, last in db.execute("SELECT id, id FROM groups UNION ALL SELECT first, last FROM archived ORDER BY 1"):
        missing.extend(range(next_group, first))
        next_group = last + 1
    return Backlog(replays, groups_of(row for row in rows if row.step is None), missing, next_group)


def _by_step(rows: Iterable[Row]) -> dict[int, list[Group]]:
    steps: dict[int, list[Row]] = {}
    for row in rows:
        assert row.step is not None
        steps.setdefault(row.step, []).append(row)
    # In the order in which they were shipped, so that every sum over them comes out the same.
    return {step: sorted(groups_of(own), key=lambda group: (group.deadline, group.id)) for step, own in steps.items()}


def trained_steps(path: Path) -> list[int]:
    """Batches (counted from 1) whose rollouts the ledger or its archive holds, in order."""
    with open_for_reading(path) as db:
        query = "SELECT DISTINCT step FROM groups WHERE step IS NOT NULL"
        steps = {step for (step,) in db.execute(query)}
    return [step + 1 for step in sorted(steps.union(Archive(path).steps()))]


def read_rollouts(path: Path, step: int | None) -> list[RolloutRow]:
    """Rollouts of one batch (counted from 1); None for those that none has trained and that are not archived yet."""
    # The ledger first: a step leaves it only when the archive has it.
    with open_for_reading(path) as db:
        rows = select_rows(db, "g.step IS NULL") if step is None else select_rows(db, "g.step = ?", (step - 1,))
    if not rows and step is not None and step - 1 in Archive(path).steps():
        rows = [row for row in Archive(path).read(step - 1) if row.step is not None]
    return [readable(row) for row in rows]
