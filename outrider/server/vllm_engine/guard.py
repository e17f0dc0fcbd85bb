"""Run as a script, ``guard.py GROUP DIRECTORY``: waits until whoever holds the other end of its standard input is gone,
however it went, and then ends all processes of the group and removes the directory. vLLM's processes outlive a parent
that is killed."""

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

#: Seconds for Python's resource trackers to remove the shared memory of processes that were killed.
REMOVAL = 5.0


def end(group: int) -> None:
    """Kill the group's processes. Those that track the resources of others come last: they remove these, and end by
    themselves, when nobody is left."""
    until = time.monotonic() + REMOVAL
    while (members := dict(_members(group))) and time.monotonic() < until:
        for pid, tracks in members.items():
            if not tracks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _members(group: int) -> Iterator[tuple[int, bool]]:
    """Process ids of those that still run, and whether they are resource trackers."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ends at this moment
            state, _, of = (path / "stat").read_bytes().rpartition(b")")[2].split()[:3]
            if int(of) == group and state != b"Z":
                yield int(path.name), b"resource_tracker" in (path / "cmdline").read_bytes()


if __name__ == "__main__":
    while sys.stdin.buffer.read(1):
        pass
    end(int(sys.argv[1]))
    shutil.rmtree(sys.argv[2], ignore_errors=True)
