"""kill -9 of the trainer at random moments, over and over: every prompt is trained once, on rollouts made once."""

import itertools
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from outrider.collector.archive import Archive
from outrider.collector.ledger_rows import Row, groups_of, open_for_reading, select_rows
from outrider.demo.task import problems, write_jsonl
from tests.end_to_end.conftest import Train
from tests.end_to_end.processes import SHARED_MEMORY, Command, all_gone, ranks_of
from tests.end_to_end.records import steps, summary

pytestmark = pytest.mark.runs

GROUPS, K = 8, 2
#: Scores that differ within every group, and a note of each group that is scored, in which life of the run.
REWARD = """
import asyncio, os

async def noted(completions, prompts, **columns):
    await asyncio.sleep(0.3)
    with open(os.environ["SCORED"], "a") as file:
        file.write(f"{os.environ['LIFE']} {prompts[0]}\\n")
    return [place + 0.01 * len(text) for place, text in enumerate(completions)]
"""


@dataclass(frozen=True)
class Killer:
    """Starts the run again and again, and kills it. count: steps of the run, which are an epoch."""

    train: Train
    directory: Path
    count: int
    moments: random.Random
    pids: list[int] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.directory / "run"

    def prepare(self) -> None:
        """Data and the reward function."""
        write_jsonl(self.directory / "epoch.jsonl", problems("train", GROUPS * self.count, seed=0))
        (self.directory / "noted.py").write_text(REWARD)

    def start(self, life: int, processes: int) -> Command:
        """The same command every time, but for the number of processes."""
        environment = {"SCORED": str(self.directory / "scored"), "LIFE": str(life)}
        if processes > 1:
            environment["NPROC_PER_NODE"] = str(processes)
        return self.train(
            self.directory, environment=environment, dataset="epoch.jsonl", reward_funcs="noted.py:noted",
            per_device_train_batch_size=4 * GROUPS // processes, max_steps=None, num_train_epochs=1, max_staleness=K,
            save_steps=2, save_total_limit=2, ledger_keep_steps=3, resume_from_checkpoint="auto",
        )  # fmt: skip

    def kill(self, life: int, processes: int) -> str:
        """Start, wait for a random moment, kill one process. What was killed and when, in words."""
        trainer = self.start(life, processes)
        # Rewards take their time, so that a run of 8 steps a life does not end before all kills.
        if self.moments.random() < 0.25:
            delay, since = self.moments.uniform(2, 9), "its start"
            until = time.monotonic() + delay
            while time.monotonic() < until and not trainer.said(r"^step (\d+)/"):
                time.sleep(0.01)
        else:
            reached = int(trainer.wait_for(r"^step (\d+)/")[1]) + self.moments.randint(0, 4)
            trainer.wait_for(f"^step {reached}/")
            delay, since = self.moments.uniform(0, 0.4), f"step {reached}"
            time.sleep(delay)
        descendants = trainer.descendants()
        ranks = ranks_of(trainer.pid) if processes > 1 else {}
        name, victim = "the trainer", trainer.pid
        if ranks:
            name = self.moments.choice(["the launcher", *(f"rank {rank}" for rank in sorted(ranks))])
            victim = ranks.get(name.removeprefix("rank "), trainer.pid)
        assert trainer.process.poll() is None, "it has ended too soon: " + repr(trainer.wait())
        os.kill(victim, signal.SIGKILL)
        done = trainer.wait()
        self.pids.extend([trainer.pid, *descendants])
        assert done.status != 0
        assert all_gone(descendants)
        last = re.findall(r"^step (\d+)/", done.out, re.MULTILINE)
        told = f"{name} of {processes}, {delay:.1f} s after {since}, last step shown: {last[-1] if last else 'none'}"
        resumed = re.search(r"resumed from \S*?(checkpoint-\d+)", done.out)
        return f"{told}, {'resumed from ' + resumed[1] if resumed else 'not resumed'}"


@dataclass(frozen=True)
class State:
    """What a run has on disk. groups: by id; steps: of the trained ones; archived: ids that are in files."""

    groups: dict[int, list[Row]]
    archived: set[int]

    @property
    def trained(self) -> dict[int, int]:
        return {group: rows[0].step for group, rows in self.groups.items() if rows[0].step is not None}


def read_state(run: Path) -> State:
    """Ledger and archive together; what is in both must be equal."""
    path = run / "ledger.sqlite"
    if not path.exists() or not path.stat().st_size:
        return State({}, set())
    with open_for_reading(path) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'rollouts'").fetchone():
            return State({}, set())
        in_ledger = by_group(select_rows(db, "TRUE"))
    archive = Archive(path)
    in_files = by_group([row for step in archive.steps() for row in archive.read(step)])
    for group in in_ledger.keys() & in_files.keys():
        assert groups_of(in_ledger[group]) == groups_of(in_files[group])
    return State(in_files | in_ledger, set(in_files) - set(in_ledger))


def by_group(rows: list[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(row.group, []).append(row)
    assert all([row.place for row in own] == list(range(4)) for own in found.values()), "a group is whole, and once"
    return found


def sampled(rows: list[Row]) -> list[Row]:
    """Without what training adds."""
    return [row._replace(state="", step=None, advantages=None) for row in rows]


def check_nothing_is_lost(before: State, after: State) -> None:
    """Steps stay what they were, and finished rollouts are used as they are."""
    assert before.trained.items() <= after.trained.items()
    for group, rows in before.groups.items():
        now = after.groups[group]
        assert now[0].state in ({"trained"} if rows[0].state == "trained" else {"finished", "trained"})
        assert sampled(now) == sampled(rows)
    assert before.archived <= after.archived


def check_end(killer: Killer, states: list[State]) -> None:
    """The epoch, once. states: after each life."""
    final, run = states[-1], killer.run
    assert (summary(run).finished, summary(run).steps) == (True, killer.count)
    assert [row.step for row in steps(run)] == list(range(1, killer.count + 1))
    asked = [problem.prompt for problem in problems("train", GROUPS * killer.count, seed=0)]
    assert Counter(rows[0].prompt for rows in final.groups.values()) == Counter(asked)
    assert Counter(final.trained.values()) == dict.fromkeys(range(killer.count), GROUPS)
    assert all(rows[0].state == "trained" for rows in final.groups.values())
    # Nobody sampled a group again that an earlier life had left finished.
    ids = {rows[0].prompt: group for group, rows in final.groups.items()}
    scored = [line.split() for line in (killer.directory / "scored").read_text().splitlines()]
    for life, prompt in scored:
        assert int(life) == 0 or ids[prompt] not in states[int(life) - 1].groups
    assert {prompt for _, prompt in scored} == set(asked)
    # The newest steps are in the ledger, all others but the last checkpoints' in files, and none is in both.
    assert final.archived
    with open_for_reading(run / "ledger.sqlite") as db:
        assert not final.archived & {row.group for row in select_rows(db, "TRUE")}


def difference(killer: Killer, model: Path) -> float:
    """How far the final weights are from those of a run that takes the steps of the ledger one after the other, with
    nothing in between; as a share of how far training has moved them. model: what it began with."""
    again = replace(killer, directory=killer.directory / "again")
    again.run.mkdir(parents=True)
    again.prepare()
    for name in ("ledger.sqlite", "ledger.sqlite-wal"):
        if (killer.run / name).exists():
            shutil.copy(killer.run / name, again.run / name)
    shutil.copytree(killer.run / "rollouts", again.run / "rollouts")
    done = again.start(0, processes=1).wait()
    assert (done.status, done.err) == (0, "")
    assert not (again.directory / "scored").exists(), "it had all rollouts"
    killed, whole, begun = (
        torch.cat([weights.double().flatten() for _, weights in sorted(load_file(path / "model.safetensors").items())])
        for path in (killer.run / "final", again.run / "final", model)
    )
    return float((killed - whole).norm() / (whole - begun).norm())


def kill_and_resume(killer: Killer, lives: list[int]) -> list[State]:
    """Kill the run once for each entry of ``lives``, its number of processes; then let it end. Its states."""
    killer.prepare()
    states = []
    for life, processes in enumerate(lives):
        told = killer.kill(life, processes)
        states.append(read_state(killer.run))
        trained, archived = len(states[-1].trained), len(states[-1].archived)
        print(f"kill {life + 1}: {told}; {trained} groups trained, {archived} of them in files", flush=True)
    done = killer.start(len(lives), lives[-1]).wait()
    assert done.status == 0, done
    states.append(read_state(killer.run))
    assert not [path for pid in killer.pids for path in SHARED_MEMORY.glob(f"outrider-*-{pid}-*")], "left by the dead"
    for before, after in itertools.pairwise(states):
        check_nothing_is_lost(before, after)
    check_end(killer, states)
    return states


def test_three_kills(train: Train, demo_model: Path, tmp_path: Path) -> None:
    killer = Killer(train, tmp_path, count=18, moments=random.Random(5))
    kill_and_resume(killer, [1, 1, 1])


@pytest.mark.kills
def test_twenty_kills(train: Train, demo_model: Path, tmp_path: Path) -> None:
    """Twice: one process to the bit, then one and two in turn."""
    seed = int(os.environ.get("OUTRIDER_TEST_SEED", "0"))
    for name, lives in (("one", [1] * 6), ("several", [2, 1] * 7)):
        killer = Killer(train, tmp_path / name, count=8 * len(lives) + 6, moments=random.Random(f"{seed} {name}"))
        killer.directory.mkdir()
        kill_and_resume(killer, lives)
        apart = difference(killer, demo_model)
        print(f"the weights differ by {apart:.2g} of their way from those of the same steps without a kill")
        assert apart == 0 if name == "one" else apart < 1e-4
