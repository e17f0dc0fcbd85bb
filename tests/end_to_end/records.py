"""What a run has left in its directory."""

import math
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from outrider.observe.metrics import read_metrics, steps_of
from outrider.observe.records import StepRecord
from outrider.trainer.summary import Summary


def query(run: Path, sql: str) -> list[tuple[Any, ...]]:
    """Rows of the run's ledger."""
    with closing(sqlite3.connect(f"file:{run / 'ledger.sqlite'}?mode=ro", uri=True)) as ledger:
        return ledger.execute(sql).fetchall()


def trained(run: Path) -> list[tuple[Any, ...]]:
    """Everything that the ledger knows of the rollouts that were trained."""
    columns = "g.id, g.step, g.prompt, place, tokens, logprobs, versions, text, reward, rewards, advantages"
    return query(
        run,
        f"SELECT {columns} FROM groups g JOIN rollouts ON group_id = g.id WHERE state = 'trained' ORDER BY g.id, place",
    )


def steps(run: Path) -> list[StepRecord]:
    """The rows of ``metrics.jsonl`` for steps."""
    return steps_of(read_metrics(run / "metrics.jsonl"))


def summary(run: Path) -> Summary:
    """``summary.json``."""
    return msgspec.json.decode((run / "summary.json").read_bytes(), type=Summary)


def check_finished(run: Path, count: int, groups: int, bound: int) -> None:
    """What holds for every run that came to its end. groups: of a step; bound: K."""
    found = steps(run)
    assert [row.step for row in found] == list(range(1, count + 1))
    assert all(row.staleness_max <= bound for row in found)
    assert all(math.isfinite(value) for row in found for value in (row.loss, row.grad_norm, row.reward, row.kl))
    assert all(row.tokens_trained > 0 for row in found)
    end = summary(run)
    assert (end.finished, end.steps, end.max_staleness) == (True, count, bound)
    assert end.max_staleness_seen == max(row.staleness_max for row in found)
    check_ledger(run, count, groups, bound)
    assert (run / "final" / "model.safetensors").exists()
    assert "<html" in (run / "report.html").read_text()


def check_ledger(run: Path, count: int, groups: int, bound: int) -> None:
    """Every step has its groups, no id was skipped, and no token is older than the bound."""
    by_step = query(run, "SELECT step, count(*) FROM groups WHERE state = 'trained' GROUP BY step ORDER BY step")
    assert by_step == [(step, groups) for step in range(count)]
    last, settled = query(run, "SELECT max(id), (SELECT max(id) FROM groups WHERE state = 'trained') FROM groups")[0]
    known = {row[0] for row in query(run, "SELECT id FROM groups")}
    assert set(range(settled + 1)) <= known
    assert last < (count + bound + 1) * groups + len(query(run, "SELECT id FROM groups WHERE state = 'dropped'"))
    for _, step, _, _, tokens, logprobs, versions, *_ in trained(run):
        spans = msgspec.msgpack.decode(versions, type=list[tuple[int, int]])
        assert len(tokens) == len(logprobs) == 4 * sum(length for _, length in spans)
        assert all(0 <= step - version <= bound for version, _ in spans)
