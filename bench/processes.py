"""Servers and trainers as processes on chosen cores, and the CPU time of each."""

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from outrider.contract.lifetime import die_with_parent

START_DEADLINE = 120.0
TICK = 0.3

#: The environment that outrider's own commands make for themselves, and one key for all.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "OUTRIDER_API_KEY": "bench",
}


def _settle(cores: Collection[int]) -> None:
    os.sched_setaffinity(0, cores)
    die_with_parent(signal.SIGTERM)


def start(command: list[str], cores: Collection[int], log: Path) -> "subprocess.Popen[bytes]":
    """Start a process on ``cores``, which its children inherit, with its output in ``log``."""
    with open(log, "wb") as output:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=ENVIRONMENT,
            start_new_session=True,
            preexec_fn=functools.partial(_settle, cores),
        )


@contextlib.contextmanager
def rollout_server(
    model: Path, cores: Collection[int], threads: int, log: Path, *flags: str
) -> Iterator[tuple[int, int]]:
    """``outrider rollout``, as long as the block lasts; its process id and its port."""
    command = [
        *(sys.executable, "-m", "outrider.cli.main", "rollout", "--model", str(model), "--host", "127.0.0.1"),
        *("--port", "0", "--threads", str(threads), "--drain_timeout", "2", *flags),
    ]
    server = start(command, cores, log)
    try:
        until = time.monotonic() + START_DEADLINE
        while not (found := re.search(r"^listening on \S+:(\d+)", log.read_text(errors="replace"), re.MULTILINE)):
            if server.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)
        yield server.pid, int(found.group(1))
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def run(
    command: list[str], cores: Collection[int], log: Path, others: dict[str, int] | None = None
) -> dict[str, float]:
    """Run a trainer to its end; CPU seconds by process: ``trainer``, ``collector``, ``reward workers``, and those of
    the running processes ``others``, by name and process id, in the same time."""
    before = {name: _family_seconds(pid) for name, pid in (others or {}).items()}
    process = start(command, cores, log)
    used: dict[int, tuple[str, float]] = {}
    done = threading.Event()

    def watch() -> None:
        # Until its end, when the figures are gone with the process.
        while not done.wait(TICK):
            for pid in _family(process.pid):
                with contextlib.suppress(OSError, IndexError):
                    used[pid] = _role(pid, process.pid), _seconds(pid)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        status = process.wait()
    finally:
        done.set()
        watching.join()
    if status != 0:
        raise SystemExit(f"{' '.join(command)} ended with status {status}:\n{log.read_text(errors='replace')[-3000:]}")
    figures = {name: _family_seconds(pid) - before[name] for name, pid in (others or {}).items()}
    for role, seconds in used.values():
        figures[role] = figures.get(role, 0.0) + seconds
    return figures


def _family(pid: int) -> Iterator[int]:
    """A process and its descendants."""
    yield pid
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split():
                yield from _family(int(child))


def _role(pid: int, trainer: int) -> str:
    if pid == trainer:
        return "trainer"
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return "collector" if "outrider.collector.process" in words else "reward workers"


def _seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _family_seconds(pid: int) -> float:
    found = 0.0
    for member in _family(pid):
        with contextlib.suppress(OSError, IndexError):
            found += _seconds(member)
    return found


def two_cores() -> tuple[int, int]:
    """The first two cores that this process may use. SystemExit where there is one."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit(f"two cores are needed, and this process may use {len(cores)}")
    return cores[0], cores[1]
