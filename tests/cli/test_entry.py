"""How a process that runs a command ends."""

import os
import subprocess
import sys

import pytest

SAYS = """
import atexit, sys
from outrider.cli.entry import be_process
atexit.register(print, "taken apart")
def main():
    print("said", end="")
    {end}
if {trains}:
    sys.modules["outrider.trainer.ranks"] = sys
be_process(main)
"""


def ended(end: str, trains: bool, stdout: int = subprocess.PIPE) -> "subprocess.CompletedProcess[str]":
    """A process whose command says something, and then does ``end``."""
    return subprocess.run(
        [sys.executable, "-c", SAYS.format(end=end, trains=trains)],
        env=os.environ | {"PYTHONUNBUFFERED": ""}, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("trains", "printed"), [(False, "saidtaken apart\n"), (True, "said")])
@pytest.mark.parametrize(
    ("end", "status", "why"),
    [
        ("return 130", 130, ""),
        ("raise SystemExit(2)", 2, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit('why')", 1, "why\n"),
    ],
)
def test_a_process_that_has_trained_is_not_taken_apart(
    end: str, status: int, why: str, trains: bool, printed: str
) -> None:
    """It has said everything by then, and its exit status is the command's."""
    done = ended(end, trains)
    assert (done.returncode, done.stdout, done.stderr) == (status, printed, why)


@pytest.mark.parametrize("trains", [False, True])
def test_an_error_is_shown_with_its_traceback(trains: bool) -> None:
    done = ended("raise ValueError('why')", trains)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ValueError: why\n")


def test_a_trainer_whose_reader_has_left_keeps_its_status() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = ended("return 130", True, writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (130, "")


NOW = """
import threading, time
from outrider.contract import lifetime
lifetime.LAST_WORDS = 0.3
threading.Thread(target=time.sleep, args=(60,)).start()
lifetime.end_now({words}, 7)
"""


@pytest.mark.parametrize(
    ("words", "said"), [("lambda: print('bye', flush=True)", "bye\n"), ("lambda: time.sleep(60)", "")]
)
def test_a_process_ends_now_whatever_its_threads_and_last_words_do(words: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOW.format(words=words)], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (7, said)
