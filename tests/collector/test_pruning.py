"""Old steps go from the ledger to Parquet files: everything is somewhere, once, whatever happens."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from pyarrow import parquet

from outrider.collector.groups import Group, set_advantages
from outrider.collector.ledger import Ledger, read_rollouts, trained_steps
from outrider.collector.ledger_rows import open_for_reading, select_rows
from outrider.collector.pruning import Pruner
from outrider.contract.errors import UserError
from tests.collector.build import group, rollout

FACTS = {"seed": "0"}


def open_ledger(directory: Path, resume: bool = False) -> Ledger:
    return Ledger(directory / "ledger.sqlite", FACTS, resume)


def rich_group(group_id: int) -> Group:
    """Masks, several versions, an empty rollout, a function without an opinion, text beyond ASCII, long fractions."""
    rollouts = [
        rollout([7, 8, 9], versions=[(3, 1), (5, 2)], mask=bytes([1, 0, 1]), text="ä\n\u2028"),
        rollout([], versions=[], text=""),
        rollout([2**17], versions=[(4, 1)]),
    ]
    return Group(group_id, 6, "prompt", rollouts, [0.1, -1 / 3, 3.0], {"b": [0.1, None, 1.0], "a": [0.0, -1 / 3, 2]})


def fill(ledger: Ledger, steps: int) -> dict[int, list[Group]]:
    """Steps of two groups each."""
    filled = {}
    for step in range(steps):
        batch = [group(2 * step), rich_group(2 * step + 1)]
        set_advantages([batch[0]], "group")
        set_advantages([batch[1]], "group")
        for one in batch:
            ledger.finished(one)
        ledger.trained(step, batch).result()
        filled[step] = batch
    return filled


def prune(ledger: Ledger, before: int, keep: int = 0) -> list[str]:
    """Wait for one round; what the user was told."""
    told: list[str] = []
    pruner = Pruner(ledger, keep, told.append)
    pruner.release(before)
    pruner._thread.submit(lambda: None).result()
    pruner.close()
    return told


def held(ledger: Ledger) -> list[int]:
    """Ids of the groups whose rollouts are in the ledger itself."""
    with open_for_reading(ledger.path) as db:
        return [row.group for row in select_rows(db, "TRUE") if row.place == 0]


def test_nothing_changes_for_readers(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    fill(ledger, 6)
    ledger.dropped(12, "stale", group(12, deadline=2)).result()
    ledger.finished(group(14)).result()
    before = {step: read_rollouts(ledger.path, step) for step in trained_steps(ledger.path)}
    assert prune(ledger, before=4) == []
    assert held(ledger) == [8, 9, 10, 11, 14]
    assert trained_steps(ledger.path) == [1, 2, 3, 4, 5, 6]
    assert {step: read_rollouts(ledger.path, step) for step in before} == before
    backlog = ledger.backlog(4)
    assert (sorted(backlog.replays), backlog.missing, backlog.next_group) == ([4, 5], [13], 15)
    ledger.close()


def test_a_run_may_go_on_from_before_what_was_moved(tmp_path: Path) -> None:
    """From a checkpoint that was kept elsewhere: every bit of a group comes back from its file."""
    ledger = open_ledger(tmp_path)
    filled = fill(ledger, 5)
    prune(ledger, before=4)
    ledger.close()
    again = open_ledger(tmp_path, resume=True)
    assert again.backlog(1).replays == {step: filled[step] for step in (1, 2, 3, 4)}
    again.archive.path(2).unlink()
    assert sorted(again.backlog(3).replays) == [3, 4]
    with pytest.raises(UserError, match=r"step-00000003.parquet: the rollouts of step 3 .* put the file back"):
        again.backlog(1)
    again.close()


@pytest.mark.parametrize(("before", "keep", "left"), [(9, 2, [4, 5]), (3, 2, [3, 4, 5]), (9, 0, []), (0, 0, range(6))])
def test_what_a_resume_needs_and_the_newest_steps_stay(before: int, keep: int, left: list[int], tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    fill(ledger, 6)
    prune(ledger, before, keep)
    assert held(ledger) == [group_id for step in left for group_id in (2 * step, 2 * step + 1)]
    assert prune(ledger, before, keep) == []
    backlog = ledger.backlog(6)
    assert (backlog.missing, backlog.next_group) == ([], 12)
    ledger.close()


def test_a_dropped_group_goes_with_the_steps_of_its_time(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    fill(ledger, 3)
    ledger.dropped(6, "all rewards equal", group(6, deadline=1))
    ledger.dropped(7, "all rewards equal", group(7, deadline=2)).result()
    prune(ledger, before=2)
    assert held(ledger) == [4, 5, 7]
    table = parquet.read_table(ledger.archive.path(1)).to_pylist()
    assert [(row["group"], row["step"], row["state"]) for row in table if row["index"] == 0] == [
        (2, 2, "trained"),
        (3, 2, "trained"),
        (6, None, "dropped"),
    ]
    assert [row.group for row in read_rollouts(ledger.path, 2)] == [2, 2, 3, 3, 3]
    assert ledger.backlog(2).missing == []
    ledger.close()


def test_the_file_is_for_other_programs_too(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    fill(ledger, 1)
    prune(ledger, before=1)
    ledger.close()
    [path] = (tmp_path / "rollouts").iterdir()
    row = parquet.read_table(path).to_pylist()[2]
    assert path.name == "step-00000001.parquet"
    assert (row["tokens"], row["logprobs"], row["mask"]) == ([7, 8, 9], [-7 / 8, -1.0, -9 / 8], b"\1\0\1")
    assert row["versions"] == [{"version": 3, "tokens": 1}, {"version": 5, "tokens": 2}]
    assert (row["prompt"], row["prompt_tokens"], row["completion"]) == ("prompt", [5, 6], "ä\n\u2028")
    assert row["rewards"] == [("b", 0.1), ("a", 0.0)]


def test_a_step_that_was_exported_and_not_deleted_is_there_once(tmp_path: Path) -> None:
    """What a kill between the two leaves behind."""
    ledger = open_ledger(tmp_path)
    fill(ledger, 3)
    before = [read_rollouts(ledger.path, step) for step in (1, 2, 3)]
    with open_for_reading(ledger.path) as db:
        ledger.archive.write(0, select_rows(db, "g.step = 0"))
    (ledger.archive.directory / "step-00000002.unfinished").write_bytes(b"half of it")
    ledger.close()
    again = open_ledger(tmp_path, resume=True)
    assert trained_steps(again.path) == [1, 2, 3]
    assert sorted(again.backlog(0).replays) == [0, 1, 2]
    assert [read_rollouts(again.path, step) for step in (1, 2, 3)] == before
    prune(again, before=2)
    assert held(again) == [4, 5]
    assert sorted(path.name for path in again.archive.directory.iterdir()) == [
        "step-00000001.parquet",
        "step-00000002.parquet",
    ]
    assert [read_rollouts(again.path, step) for step in (1, 2, 3)] == before
    again.close()


def test_files_of_another_run_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    fill(ledger, 2)
    prune(ledger, before=2)
    ledger.close()
    for path in tmp_path.glob("ledger.*"):
        path.unlink()
    with pytest.raises(UserError, match=r"rollouts holds rollouts of another run: choose another --output_dir"):
        open_ledger(tmp_path)


def test_what_cannot_be_exported_stays(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    fill(ledger, 2)
    (tmp_path / "rollouts").write_text("in the way")
    [told] = prune(ledger, before=2)
    assert "old steps stay in the ledger until the next checkpoint: " in told
    assert held(ledger) == [0, 1, 2, 3]
    (tmp_path / "rollouts").unlink()
    assert prune(ledger, before=2) == []
    assert held(ledger) == []
    ledger.close()


PROGRAM = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from outrider.collector.pruning import Pruner
    from outrider.collector.groups import set_advantages
    from tests.collector.test_pruning import open_ledger, rich_group

    ledger = open_ledger(Path(sys.argv[1]), resume=True)
    pruner = Pruner(ledger, 1, print)
    step = max(ledger.backlog(0).replays, default=-1) + 1
    while True:
        batch = [rich_group(2 * step), rich_group(2 * step + 1)]
        for one in batch:
            ledger.finished(one)
        set_advantages(batch, "none")
        ledger.trained(step, batch).result()
        pruner.release(step)
        print(step, flush=True)
        step += 1
    """
)


def test_a_kill_at_any_moment_neither_loses_nor_doubles_a_rollout(tmp_path: Path) -> None:
    confirmed = -1
    moments = random.Random(1)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
        )
        assert process.stdout is not None
        begun = int(process.stdout.readline())
        assert begun in (confirmed + 1, confirmed + 2), "the step that was being written is whole or not there"
        time.sleep(moments.uniform(0.2, 1.0))
        process.send_signal(signal.SIGKILL)
        confirmed = max([begun, *map(int, process.stdout.read().split())])
        process.wait()
        ledger = open_ledger(tmp_path, resume=True)
        backlog, own = ledger.backlog(0), held(ledger)
        assert sorted(backlog.replays) == list(range(max(backlog.replays) + 1))
        assert max(backlog.replays) in (confirmed, confirmed + 1)
        for step, groups in backlog.replays.items():
            wanted = [rich_group(2 * step), rich_group(2 * step + 1)]
            set_advantages(wanted, "none")
            assert groups == wanted
        assert backlog.missing == []
        # At most one step is in both, and it is the oldest one in the ledger.
        both = [step for step in ledger.archive.steps() if 2 * step in own]
        assert both in ([], [own[0] // 2])
        ledger.close()
    assert len(ledger.archive.steps()) > 8
