"""The ledger: what is written comes back, whatever happened in between."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.collector.groups import Group, set_advantages
from outrider.collector.ledger import Ledger, read_rollouts, trained_steps
from outrider.contract.errors import UserError
from tests.collector.build import group, rollout

FACTS = {"seed": "0", "dataset": "abc"}


def open_ledger(directory: Path, resume: bool = False, facts: dict[str, str] = FACTS) -> Ledger:
    return Ledger(directory / "ledger.sqlite", facts, resume)


def rich_group() -> Group:
    """Masks, several versions, an empty rollout, a function without an opinion, text beyond ASCII."""
    rollouts = [
        rollout([7, 8, 9], versions=[(3, 1), (5, 2)], mask=bytes([1, 0, 1]), text="ä\n\u2028"),
        rollout([], versions=[], text=""),
        rollout([2**17], versions=[(4, 1)]),
    ]
    return Group(11, 6, "prompt", rollouts, [0.5, -1.25, 3.0], {"first": [0.5, None, 1.0], "second": [0.0, -1.25, 2]})


def test_a_group_comes_back_as_it_was(tmp_path: Path) -> None:
    ledger, written = open_ledger(tmp_path), rich_group()
    ledger.finished(written).result()
    ledger.close()
    again = open_ledger(tmp_path, resume=True)
    [found] = again.backlog(0).finished
    again.close()
    assert found == written


def test_advantages_come_back_with_the_step(tmp_path: Path) -> None:
    ledger, written = open_ledger(tmp_path), [group(0), group(1, rewards=(0.25, 0.5))]
    set_advantages(written, "group")
    for one in written:
        ledger.finished(one)
    ledger.trained(0, written).result()
    backlog = ledger.backlog(0)
    ledger.close()
    assert backlog.replays == {0: written}
    assert backlog.finished == []


@settings(max_examples=25, deadline=None)
@given(
    fates=st.lists(st.sampled_from(["finished", "trained", "dropped", "rejected", "flying"]), max_size=24),
    size=st.integers(1, 3),
    start=st.integers(0, 8),
    seed=st.integers(0, 2**32),
)
def test_backlog_of_any_history(
    tmp_path_factory: pytest.TempPathFactory, fates: list[str], size: int, start: int, seed: int
) -> None:
    """Every group is in exactly one place: replayed, finished, missing, or over and done with."""
    ledger = open_ledger(tmp_path_factory.mktemp("ledger"))
    of = {fate: [number for number, own in enumerate(fates) if own == fate] for fate in set(fates)}
    groups = {number: group(number, deadline=number // size) for number in range(len(fates))}
    to_train = of.get("trained", [])
    to_train = to_train[: len(to_train) // size * size]
    order = [number for number in groups if fates[number] != "flying"]
    random.Random(seed).shuffle(order)  # groups end in any order
    for number in order:
        if fates[number] == "rejected":
            ledger.dropped(number, "prompt rejected")
            continue
        ledger.finished(groups[number])
        if fates[number] == "dropped":
            ledger.dropped(number, "stale", groups[number])
    steps = {step: to_train[step * size : (step + 1) * size] for step in range(len(to_train) // size)}
    for step, numbers in steps.items():
        batch = [groups[number] for number in numbers]
        set_advantages(batch, "none")
        ledger.trained(step, batch)
    if start > len(steps):
        with pytest.raises(UserError, match=f"goes on after {start} batches, and its ledger has {len(steps)} of them"):
            ledger.backlog(start)
        ledger.close()
        return
    backlog = ledger.backlog(start)
    ledger.close()

    ended = [number for number in range(len(fates)) if fates[number] != "flying"]
    next_group = max(ended, default=-1) + 1
    assert {step: [g.id for g in own] for step, own in backlog.replays.items()} == {
        step: numbers for step, numbers in steps.items() if step >= start
    }
    untrained = set(of.get("finished", [])) | set(of.get("trained", [])) - set(to_train)
    assert [g.id for g in backlog.finished] == sorted(untrained)
    assert backlog.next_group == next_group
    assert backlog.missing == [number for number in of.get("flying", []) if number < next_group]


def test_a_dropped_group_can_be_looked_at(tmp_path: Path) -> None:
    """What was given up is not taken up again, yet shows in the record with its reason."""
    ledger = open_ledger(tmp_path)
    ledger.finished(group(0)).result()
    ledger.dropped(0, "stale: version 0 in step 9", group(0)).result()
    ledger.dropped(1, "prompt rejected: too long").result()
    backlog = ledger.backlog(0)
    ledger.close()
    assert (backlog.finished, backlog.missing, backlog.next_group) == ([], [], 2)
    rows = read_rollouts(ledger.path, None)
    assert [(row.group, row.state, row.reason) for row in rows] == [(0, "dropped", "stale: version 0 in step 9")] * 2


def test_facts_of_another_run_are_refused_with_both_values(tmp_path: Path) -> None:
    open_ledger(tmp_path).close()
    with pytest.raises(UserError, match=r"dataset abc; this one has xyz"):
        open_ledger(tmp_path, resume=True, facts={**FACTS, "dataset": "xyz"})
    open_ledger(tmp_path, resume=True).close()


def test_a_fact_that_an_earlier_version_did_not_keep_is_kept_from_now_on(tmp_path: Path) -> None:
    open_ledger(tmp_path).close()
    open_ledger(tmp_path, resume=True, facts={**FACTS, "dataset_shuffle": "true"}).close()
    with pytest.raises(UserError, match=r"run with dataset_shuffle true; this one has false: resume with the same"):
        open_ledger(tmp_path, resume=True, facts={**FACTS, "dataset_shuffle": "false"})


def test_a_ledger_has_an_id_of_its_own(tmp_path: Path) -> None:
    ids = []
    for directory, resume in ((tmp_path / "one", False), (tmp_path / "two", False), (tmp_path / "one", True)):
        ledger = open_ledger(directory, resume)
        ids.append(ledger.id)
        ledger.close()
    assert ids[0] == ids[2] != ids[1]


def test_a_new_run_does_not_take_a_used_directory(tmp_path: Path) -> None:
    open_ledger(tmp_path).close()
    with pytest.raises(UserError, match=r"another run's ledger.*--resume_from_checkpoint auto"):
        open_ledger(tmp_path)


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"not a database, whatever else it may be" * 100)
    with pytest.raises(UserError, match="cannot be written"):
        open_ledger(tmp_path, resume=True)
    with pytest.raises(UserError, match="cannot be read"):
        trained_steps(tmp_path / "ledger.sqlite")


def test_rows_for_readers(tmp_path: Path) -> None:
    """Steps count from 1 for people. The file can be read while the run writes it, wherever it lies."""
    directory = tmp_path / "100% a #1 run?"
    ledger, trained, waiting = open_ledger(directory), rich_group(), group(12)
    set_advantages([trained], "none")
    ledger.finished(trained)
    ledger.finished(waiting)
    ledger.trained(6, [trained]).result()
    assert trained_steps(ledger.path) == [7]
    rows = read_rollouts(ledger.path, 7)
    assert [(row.step, row.group, row.index, row.tokens, row.state) for row in rows] == [
        (7, 11, 0, 3, "trained"),
        (7, 11, 1, 0, "trained"),
        (7, 11, 2, 1, "trained"),
    ]
    assert rows[0].versions == [(3, 1), (5, 2)]
    assert rows[0].completion == "ä\n\u2028"
    assert rows[1].rewards == {"first": None, "second": -1.25}
    assert [row.advantage for row in rows] == trained.advantages
    assert {row.group for row in read_rollouts(ledger.path, None)} == {12}
    assert read_rollouts(ledger.path, 1) == []
    ledger.close()
    with pytest.raises(UserError, match="cannot be read"):
        trained_steps(tmp_path / "nothing.sqlite")


def test_a_full_disk_is_told_and_not_forgotten(tmp_path: Path) -> None:
    """A group that could not be written must fail the step that it is part of, even when there is space by then:
    otherwise the step would be in the ledger without its rollouts, and could not be replayed."""
    ledger = open_ledger(tmp_path)
    ledger.finished(group(0)).result()
    pages = ledger._submit(lambda: ledger._db.execute("PRAGMA max_page_count = 1")).result  # it takes what there is
    pages()
    big = Group(1, 0, "x" * 500_000, [rollout([3]), rollout([4])], [0.0, 1.0], {"f": [0.0, 1.0]})
    ledger.finished(big)  # nobody looks at this one
    with pytest.raises(UserError, match=r"cannot be written: .*full.*--resume_from_checkpoint auto"):
        ledger.finished(big).result()
    ledger._thread.submit(lambda: ledger._db.execute("PRAGMA max_page_count = 1000000")).result()
    with pytest.raises(UserError, match="full"):
        ledger.trained(0, [group(0)]).result()
    ledger.close()
    again = open_ledger(tmp_path, resume=True)
    backlog = again.backlog(0)
    again.close()
    assert [g.id for g in backlog.finished] == [0]
    assert backlog.replays == {}


def test_a_killed_process_loses_nothing_that_was_confirmed(tmp_path: Path) -> None:
    """kill -9 while it writes as fast as it can: all confirmed groups are there, whole."""
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from outrider.collector.ledger import Ledger
        from outrider.collector.groups import set_advantages
        from tests.collector.build import group

        ledger = Ledger(Path(sys.argv[1]) / "ledger.sqlite", {"seed": "0", "dataset": "abc"}, resume=False)
        for step in range(10**6):
            batch = [group(2 * step), group(2 * step + 1)]
            for one in batch:
                ledger.finished(one)
            set_advantages(batch, "none")
            ledger.trained(step, batch).result()
            print(step, flush=True)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    assert process.stdout is not None
    confirmed = -1
    for line in process.stdout:
        confirmed = int(line)
        if confirmed == 60:
            process.send_signal(signal.SIGKILL)
    process.wait()
    assert confirmed >= 60
    ledger = open_ledger(tmp_path, resume=True)
    backlog = ledger.backlog(0)
    ledger.close()
    assert set(range(confirmed + 1)) <= set(backlog.replays)
    for step, groups in backlog.replays.items():
        assert [g.id for g in groups] == [2 * step, 2 * step + 1], "a step is written whole or not at all"
        assert all(len(g.rollouts) == len(g.advantages) == 2 for g in groups)
    with sqlite3.connect(ledger.path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def test_a_second_run_in_one_directory_is_kept_out(tmp_path: Path) -> None:
    """Two writers would train the same groups twice; the second one may come when the first has ended."""
    path = tmp_path / "ledger.sqlite"
    first = Ledger(path, {"seed": "1"}, resume=False)
    with pytest.raises(UserError, match="another run is using it"):
        Ledger(path, {"seed": "1"}, resume=True)
    first.close()
    Ledger(path, {"seed": "1"}, resume=True).close()
