"""How a process that runs a command ends."""

import os
import subprocess
import sys

import pytest

ENDS = """
import atexit
from outrider.cli.entry import leave
atexit.register(print, "taken apart")
print("said", end="")
leave(130)
"""


@pytest.mark.parametrize(("rank", "printed"), [({}, "saidtaken apart\n"), ({"LOCAL_RANK": "1"}, "said")])
def test_a_rank_leaves_without_taking_the_interpreter_apart(rank: dict[str, str], printed: str) -> None:
    """It has said everything by then, and its exit status is the command's."""
    ended = subprocess.run(
        [sys.executable, "-c", ENDS], env=os.environ | rank, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (130, printed)


def test_a_rank_whose_reader_has_left_keeps_its_status() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [sys.executable, "-c", ENDS],
        env=os.environ | {"LOCAL_RANK": "0", "PYTHONUNBUFFERED": ""},
        stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False,
    )  # fmt: skip
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (130, b"")
