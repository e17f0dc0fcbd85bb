"""Servers and trainers as processes on chosen cores, and the CPU time of each."""

import argparse
import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from outrider.contract.lifetime import die_with_parent

START_DEADLINE = 300.0
#: Seconds between two looks at a running trainer.
TICK = 0.3
#: The machine counts as idle when no more than so many cores were busy for so many seconds.
QUIET_CORES, QUIET_WINDOW, QUIET_DEADLINE = 0.15, 0.5, 30.0

#: Of all servers here.
KEY = "bench"
#: The environment that outrider's own commands make for themselves.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "OUTRIDER_API_KEY": KEY,
}


def _settle(cores: Collection[int] | None) -> None:
    if cores is not None:
        os.sched_setaffinity(0, cores)
    die_with_parent(signal.SIGTERM)


def start(
    command: list[str], cores: Collection[int] | None, log: Path, environment: Mapping[str, str] = ENVIRONMENT
) -> "subprocess.Popen[bytes]":
    """Start a process on ``cores``, which its children inherit, with its output in ``log``; None: on all."""
    with open(log, "wb") as output:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
            preexec_fn=functools.partial(_settle, cores),
        )


@contextlib.contextmanager
def rollout_server(
    model: Path, log: Path, *flags: str, cores: Collection[int] | None = None, environment: Mapping[str, str] = {}
) -> Iterator[tuple[int, str]]:
    """``outrider rollout`` with these flags, ready, as long as the block lasts; its process id and its URL. cores: all
    where it is None. environment: what it has besides ``ENVIRONMENT``."""
    command = [
        *(sys.executable, "-m", "outrider.cli.main", "rollout", "--model", str(model), "--host", "127.0.0.1"),
        *("--port", "0", "--drain_timeout", "0", *flags),
    ]
    server = start(command, cores, log, {**ENVIRONMENT, **environment})
    try:
        until = time.monotonic() + START_DEADLINE
        while not (found := re.search(r"^ready: .* on (\S+:\d+), ", log.read_text(errors="replace"), re.MULTILINE)):
            if server.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)
        yield server.pid, f"http://{found.group(1)}"
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


class Sample(NamedTuple):
    """steps: that the trainer had taken at that moment. cpu: seconds used until then, by process; ``others`` is what
    the machine spent on anything else."""

    steps: int
    cpu: dict[str, float]


def run(command: list[str], cores: Collection[int], directory: Path, server: int | None = None) -> list[Sample]:
    """Run a trainer to its end, with ``directory`` as its output, and look at the CPU time of its processes
    (``trainer``, ``collector``, ``reward workers``) and of the running ``server``, a process id, from time to time."""
    log, metrics = directory.with_suffix(".log"), directory / "metrics.jsonl"
    process = start([*command, "--output_dir", str(directory)], cores, log)
    samples = []
    while process.poll() is None:
        with contextlib.suppress(OSError):
            cpu = {} if server is None else {"server": sum(map(_seconds, _family(server)))}
            for pid in _family(process.pid):
                role = _role(pid, process.pid)
                cpu[role] = cpu.get(role, 0.0) + _seconds(pid)
            cpu["others"] = _machine_seconds() - sum(cpu.values())
            samples.append(Sample(metrics.read_bytes().count(b"\n"), cpu))
        time.sleep(TICK)
    if process.returncode != 0:
        raise SystemExit(
            f"{' '.join(command)} ended with status {process.returncode}:\n{log.read_text(errors='replace')[-3000:]}"
        )
    return samples


def cpu_of_a_step(samples: Sequence[Sample], first: int, last: int) -> dict[str, float]:
    """CPU seconds of a step, by process, from the end of step ``first`` to that of step ``last``."""
    start, end = (next(sample for sample in samples if sample.steps >= step) for step in (first, last))
    return {name: (used - start.cpu.get(name, 0.0)) / (last - first) for name, used in end.cpu.items()}


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


def _machine_seconds() -> float:
    """What all cores have worked since the machine was started."""
    user, nice, system, _, _, interrupts, soft_interrupts, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    return (user + nice + system + interrupts + soft_interrupts) / os.sysconf("SC_CLK_TCK")


def add_busy(parser: argparse.ArgumentParser) -> None:
    """The flag of benches that :func:`wait_for_quiet`."""
    parser.add_argument("--busy", action="store_true", help="on a busy machine too, where figures say nothing")


def wait_for_quiet(busy: bool = False) -> None:
    """Wait until the machine is idle, so that what ran before does not count against what runs next: servers clean up
    and threads spin for a while after their last answer. SystemExit when it does not become so. busy: do not wait."""
    if busy:
        return
    until = time.monotonic() + QUIET_DEADLINE
    while True:
        before = _machine_seconds()
        time.sleep(QUIET_WINDOW)
        busy = (_machine_seconds() - before) / QUIET_WINDOW
        if busy <= QUIET_CORES:
            return
        if time.monotonic() > until:
            raise SystemExit(f"the machine is not idle: {busy:.2f} cores are busy with something else; end it first")


def two_cores() -> tuple[int, int]:
    """The first two cores that this process may use. SystemExit where there is one."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit(f"two cores are needed, and this process may use {len(cores)}")
    return cores[0], cores[1]
