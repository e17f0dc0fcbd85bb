"""Ctrl-C, and Ctrl-C twice. Signals go to the trainer alone. For a kill that nobody can catch, see test_kills."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import Train
from tests.end_to_end.processes import Command, all_gone
from tests.end_to_end.records import check_finished, query, summary

pytestmark = pytest.mark.runs

GROUPS, STEPS = 8, 7


@pytest.fixture
def settings(data: Path) -> dict[str, Any]:
    """A run in which every step takes a while, and rewards have processes of their own too."""
    rewards = f"{data / 'rewards.py'}:unhurried exact_match"
    return {"max_steps": STEPS, "max_staleness": 1, "reward_funcs": rewards, "save_steps": 2}


def test_ctrl_c_finishes_the_step_and_the_run_goes_on_later(
    train: Train, settings: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trainer = train(tmp_path, **settings)
    trainer.wait_for("^step 2/")
    processes = trainer.descendants()
    trainer.signal(signal.SIGINT)
    done = trainer.wait()
    assert (done.status, done.err) == (130, "")
    assert "stopping after this step; once more to stop now, without saving" in done.out
    stopped = re.search(r"^stopped after step (\d) of 7; go on with the same command and --resume", done.out, re.M)
    assert stopped
    assert (run / f"checkpoint-{stopped[1]}" / "optimizer").is_dir()
    assert not (run / "final").exists()
    assert (summary(run).finished, summary(run).steps) == (False, int(stopped[1]))
    assert all_gone(processes)
    assert trainer.segments() == []

    before = dict(query(run, "SELECT id, step FROM groups WHERE state = 'trained'"))
    done = train(tmp_path, **settings, resume_from_checkpoint="auto").wait()
    assert (done.status, done.err) == (0, "")
    assert f"after step {stopped[1]}" in done.out
    check_finished(run, count=STEPS, groups=GROUPS, bound=1)
    after = dict(query(run, "SELECT id, step FROM groups WHERE state = 'trained'"))
    assert before.items() <= after.items()


def test_ctrl_c_twice_ends_at_once_and_leaves_nothing(train: Train, settings: dict[str, Any], tmp_path: Path) -> None:
    trainer = train(tmp_path, **settings)
    trainer.wait_for("^step 1/")
    processes = trainer.descendants()
    assert processes
    assert trainer.segments()
    trainer.signal(signal.SIGINT)
    trainer.wait_for("once more to stop now")
    trainer.signal(signal.SIGINT)
    done = trainer.wait()
    assert done.status == 130
    assert "Traceback" not in done.err
    assert all_gone(processes)
    assert trainer.segments() == []


def test_a_run_goes_on_without_its_reader(train: Train, settings: dict[str, Any], tmp_path: Path) -> None:
    """As with ``outrider train ... | tee log``, where Ctrl-C ends both: what there is is saved all the same."""
    reading, writing = os.pipe()
    trainer = train(tmp_path, to=writing, **settings)
    os.close(writing)
    with open(reading) as reader:
        while not reader.readline().startswith("step 2/"):
            assert trainer.process.poll() is None
    trainer.signal(signal.SIGINT)
    done = trainer.wait()
    assert (done.status, done.err) == (130, "")
    assert not summary(tmp_path / "run").finished
    assert list((tmp_path / "run").glob("checkpoint-*/optimizer"))


def test_ctrl_c_while_waiting_for_a_server(train: Train, flags: dict[str, str], tmp_path: Path) -> None:
    trainer: Command = train(tmp_path, vllm_server_port=1, vllm_server_timeout=100)
    trainer.wait_for("waiting for server http://127.0.0.1:1 ")
    processes = trainer.descendants()
    trainer.signal(signal.SIGINT)
    done = trainer.wait()
    assert (done.status, done.err) == (130, "")
    assert done.out.endswith("stopped before the first step\n")
    assert all_gone(processes)
