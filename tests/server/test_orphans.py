"""Replicas do not outlive their server, however it went."""

import os
import signal
import tempfile
import time
from pathlib import Path

from tests.contract.servers import start_torch


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *children(int(child))]
    return found


def sockets() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("outrider-replica-*"))


def test_a_killed_server_leaves_nothing(demo_model: Path, tmp_path: Path) -> None:
    """No process, and no file."""
    before = sockets()
    server = start_torch(demo_model, tmp_path, "--data_parallel_size", "2", key="key")
    descendants = children(server.process.pid)
    assert len(descendants) >= 3  # two replicas, and what they are forked from
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    deadline = time.monotonic() + 60
    while left := [pid for pid in descendants if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert sockets() <= before
