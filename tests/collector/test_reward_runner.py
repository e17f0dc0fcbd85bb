"""Reward functions that misbehave in processes of their own, and what the others notice of it: nothing."""

import asyncio
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outrider.collector.reward_runner import RewardFailed, RewardRunner, accepted_columns, check_rewards
from outrider.contract.errors import UserError
from outrider.environments.base import Rollout
from outrider.rewards.settings import RewardSettings
from tests.collector.build import rollout

FUNCTIONS = '''
import asyncio, os, sys, threading, time

class Awkward(Exception):
    """Pickles, and does not unpickle."""
    def __init__(self, a, b):
        super().__init__("awkward")

def length(completions, **columns):
    return [float(len(completion)) for completion in completions]

async def slow_length(completions, **columns):
    await asyncio.sleep(0.01)
    return [-float(len(completion)) for completion in completions]

def seen(completions, prompts, completion_ids, solution, **columns):
    assert "completions" not in columns
    return [float(p + c == s and len(i) == 2) for p, c, i, s in zip(prompts, completions, completion_ids, solution)]

def ids_only(completions, completion_ids):
    return [float(sum(ids)) if type(ids) is list and type(ids[0]) is int else None for ids in completion_ids]

async def async_ids_only(completions, completion_ids):
    return ids_only(completions, completion_ids)

def nothing_else(completions):
    return [1.0] * len(completions)

ACTIONS = {
    "raise": lambda: 1 / 0,
    "awkward": lambda: (_ for _ in ()).throw(Awkward(1, 2)),
    "sys.exit": lambda: sys.exit(3),
    "os._exit": lambda: os._exit(7),
    "hang": lambda: time.sleep(600),
    "short": lambda: [1.0],
    "text": lambda: "1.0",
    "number": lambda: 1.0,
    "none": lambda: None,
    "words": lambda: ["good", "bad"],
    "inf": lambda: [1.0, float("inf")],
    "huge": lambda: [10**400, 0],
    "lambda": lambda: [lambda: 1, 2],
    "lock": lambda: threading.Lock(),
    "generator": lambda: (1.0 for _ in range(2)),
    "dict": lambda: {1: 2, 3: 4},
    "nan": lambda: [float("nan"), 1.0],
    "bool": lambda: [True, None],
}

def scripted(completions, action, **columns):
    return ACTIONS[action[0]]()

async def async_scripted(completions, action, **columns):
    if action[0] == "hang":
        await asyncio.sleep(600)
    return ACTIONS[action[0]]()

def where(completions, **columns):
    return [float(os.getpid())] * len(completions)
'''


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "rewards.py"
    path.write_text(FUNCTIONS)
    return path


def runner_of(plugin: Path, *names: str, timeout: float = 30.0, workers: int = 1) -> RewardRunner:
    return RewardRunner([f"{plugin}:{name}" for name in names], RewardSettings(), [], timeout, workers)


@pytest.fixture(scope="module")
def scripted(plugin: Path) -> Iterator[RewardRunner]:
    runner = runner_of(plugin, "scripted", timeout=1.0)
    yield runner
    runner.close()


@pytest.fixture
async def async_scripted(plugin: Path) -> AsyncIterator[RewardRunner]:
    runner = runner_of(plugin, "async_scripted", timeout=0.2)
    yield runner
    runner.close()


def two() -> list[Rollout]:
    return [rollout([3, 4], text="ab"), rollout([5, 6], text="abcd")]


async def act(runner: RewardRunner, action: str) -> list[list[Any]]:
    return await asyncio.wait_for(runner.score(two(), "prompt", {"action": action}), 60)


async def test_plain_and_async_functions_side_by_side(plugin: Path) -> None:
    """Each gets the columns of the row, one entry a rollout; a column named ``completions`` is not passed twice."""
    runner = runner_of(plugin, "length", "slow_length", "seen")
    columns = {"solution": "promptab", "completions": "a column of the data"}
    groups = await asyncio.gather(*(runner.score(two(), "prompt", columns) for _ in range(20)))
    runner.close()
    assert runner.names == ["length", "slow_length", "seen"]
    assert groups == [[[2.0, 4.0], [-2.0, -4.0], [1.0, 0.0]]] * 20


async def test_functions_get_the_columns_they_name(plugin: Path) -> None:
    """All of them if they take any, else those that are in their signature; token ids are lists of int."""
    runner = runner_of(plugin, "ids_only", "async_ids_only", "nothing_else")
    scores = await runner.score(two(), "prompt", {"solution": "x"})
    runner.close()
    assert scores == [[7.0, 11.0], [7.0, 11.0], [1.0, 1.0]]


def test_which_columns_a_function_takes() -> None:
    class Callable:
        def __call__(self, completions: Any, solution: Any, *, prompts: Any = None) -> None: ...

    assert accepted_columns(lambda completions: None) == frozenset()
    assert accepted_columns(lambda completions, **columns: None) is None
    assert accepted_columns(Callable()) == {"solution", "prompts"}
    assert accepted_columns(functools.partial(lambda completions, n, solution: None, n=3)) == {"n", "solution"}
    assert accepted_columns(max) is None


FAILURES = [
    ("raise", "raised ZeroDivisionError: division by zero"),
    ("awkward", "raised Awkward: awkward"),
    ("sys.exit", "raised .*SystemExit: 3"),
    ("short", "returned 1 rewards for 2 completions"),
    ("text", "returned str; a list of 2 numbers is needed"),
    ("number", "returned float; a list of 2 numbers is needed"),
    ("none", "returned NoneType; a list of 2 numbers is needed"),
    ("generator", "returned generator; a list of 2 numbers is needed"),
    ("dict", "returned dict; a list of 2 numbers is needed"),
    ("words", "returned 'good', which is neither a number nor None"),
    ("inf", "returned inf"),
    ("huge", "which is neither a number nor None"),
    ("lambda", "which is neither a number nor None"),
    ("lock", "returned lock; a list of 2 numbers is needed"),
]


@pytest.mark.parametrize(("action", "reason"), FAILURES)
async def test_a_bad_call_costs_its_group_alone(scripted: RewardRunner, action: str, reason: str) -> None:
    """The reason names the function, and the next call works as if nothing had been."""
    with pytest.raises(RewardFailed, match=f"reward scripted.*{reason}"):
        await act(scripted, action)
    assert await act(scripted, "nan") == [[None, 1.0]]


@pytest.mark.parametrize(("action", "reason"), [*FAILURES, ("hang", "no result within --reward_timeout 0.2 s")])
async def test_a_bad_async_call_costs_its_group_alone(async_scripted: RewardRunner, action: str, reason: str) -> None:
    with pytest.raises(RewardFailed, match=f"reward async_scripted.*{reason}"):
        await act(async_scripted, action)
    assert await act(async_scripted, "bool") == [[1.0, None]]


@pytest.mark.parametrize(
    ("action", "reason"),
    [("hang", "no result within --reward_timeout 1 s"), ("os._exit", "its process died with exit code 7")],
)
async def test_a_process_that_hangs_or_dies_is_replaced(scripted: RewardRunner, action: str, reason: str) -> None:
    with pytest.raises(RewardFailed, match=f"reward scripted: {reason}"):
        await act(scripted, action)
    assert await act(scripted, "bool") == [[1.0, None]]


async def test_a_process_that_dies_while_idle_is_replaced(scripted: RewardRunner) -> None:
    """As when the system runs out of memory and takes the largest process that does nothing."""
    for _ in range(2):
        assert await act(scripted, "bool") == [[1.0, None]]
        for worker in multiprocessing.active_children():
            worker.kill()
        await asyncio.sleep(0.5)  # it is noticed meanwhile


async def test_calls_that_no_process_had_when_one_died_are_made_again(plugin: Path) -> None:
    """More of them than a pipe to the processes holds; and the other process does not stay."""
    before = multiprocessing.active_children()
    runner = runner_of(plugin, "where", workers=2)
    calls = [asyncio.ensure_future(runner.score([rollout([3])], "x" * 100_000, {})) for _ in range(12)]
    while len(processes := [child for child in multiprocessing.active_children() if child not in before]) < 2:
        await asyncio.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGSTOP)  # or it may have made all calls before the other's death is noticed
    processes[0].kill()
    try:
        found = await asyncio.wait_for(asyncio.gather(*calls), 60)
        await asyncio.to_thread(processes[1].join, 30)
        assert processes[1].exitcode is not None
    finally:
        runner.close()
    assert not {process.pid for process in processes} & {int(pid) for [[pid]] in found}


async def test_while_one_hangs_the_others_go_on(scripted: RewardRunner) -> None:
    """One worker: what waits behind the hanging call waits for its timeout, and is not timed out itself."""
    calls = [act(scripted, "hang" if place in (3, 9) else "bool") for place in range(30)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    failed = [place for place, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)]
    assert failed == [3, 9]
    assert all("--reward_timeout" in str(outcomes[place]) for place in failed)
    assert all(outcome == [[1.0, None]] for place, outcome in enumerate(outcomes) if place not in failed)


def test_two_functions_of_one_name_are_told_apart(plugin: Path, tmp_path: Path) -> None:
    other = tmp_path / "others.py"
    other.write_text("async def slow_length(completions, **columns):\n    return [0.0] * len(completions)\n")
    specs = [f"{plugin}:slow_length", f"{other}:slow_length"]
    assert RewardRunner(specs, RewardSettings(), [], 1.0, 1).names == specs
    with pytest.raises(UserError, match="the same function is named twice"):
        RewardRunner([specs[0], specs[0]], RewardSettings(), [], 1.0, 1)


async def test_only_computing_counts(tmp_path: Path) -> None:
    """Twenty calls of a tenth of a second for one worker: they wait 19 seconds for each other."""
    path = tmp_path / "slow.py"
    path.write_text("import time\n\ndef slow(completions):\n    time.sleep(0.1)\n    return [0.0]\n")
    runner = runner_of(path, "slow")
    await asyncio.gather(*(runner.score([rollout([3])], "prompt", {}) for _ in range(20)))
    assert 2.0 <= runner.seconds < 10.0
    runner.close()


async def test_a_plugin_that_loads_only_once_is_told(tmp_path: Path) -> None:
    """It loads here and not in a worker, as a plugin that binds a port would. Workers that die while they start would
    be started again for ever, and nobody would answer."""
    path = tmp_path / "single.py"
    path.write_text(
        textwrap.dedent(
            f"""
            import os
            os.close(os.open({str(tmp_path / "taken")!r}, os.O_CREAT | os.O_EXCL))

            def reward(completions, **columns):
                return [1.0] * len(completions)
            """
        )
    )
    runner = runner_of(path, "reward")
    with pytest.raises(RewardFailed, match=r"reward reward: it cannot be loaded in a process of its own: .*taken"):
        await asyncio.wait_for(runner.score(two(), "prompt", {}), 60)
    runner.close()


def test_workers_do_not_outlive_a_killed_collector(plugin: Path) -> None:
    program = textwrap.dedent(
        """
        import asyncio, sys
        from outrider.collector.reward_runner import RewardRunner
        from outrider.rewards.settings import RewardSettings
        from tests.collector.build import rollout

        async def main():
            runner = RewardRunner([sys.argv[1] + ":where"], RewardSettings(), [], 30.0, 1)
            [[pid]] = await runner.score([rollout([3])], "prompt", {})
            print(int(pid), flush=True)
            await asyncio.sleep(600)

        if __name__ == "__main__":
            asyncio.run(main())
        """
    )
    script = plugin.with_name("main.py")
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, script, plugin], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 30
    while _runs(worker):
        assert time.monotonic() < until, "the worker is still there half a minute later"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_arrays_are_rewards_too() -> None:
    assert check_rewards("f", np.array([1, 2]), 2) == [1.0, 2.0]
    for wrong in (np.array(1.0), np.ones((2, 2)), b"ab", {1.0, 2.0}):
        with pytest.raises(RewardFailed):
            check_rewards("f", wrong, 2)
