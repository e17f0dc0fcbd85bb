"""Replicas do not outlive their server, however it went."""

import contextlib
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from tests.contract.servers import start_torch
from tests.end_to_end.processes import all_gone


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that ends at this moment
            for child in (task / "children").read_text().split():
                found += [int(child), *children(int(child))]
    return found


def test_a_killed_server_leaves_nothing(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process, and no file."""
    place = Path(tempfile.mkdtemp())  # of a short name, as addresses of sockets need it
    monkeypatch.setenv("TMPDIR", str(place))
    server = start_torch(demo_model, tmp_path, "--data_parallel_size", "2", key="key")
    descendants = children(server.process.pid)
    assert len(descendants) >= 3  # two replicas, and what they are forked from
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    assert all_gone(descendants)
    assert not list(place.glob("outrider-replica-*"))
    shutil.rmtree(place)
