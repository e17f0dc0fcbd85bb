"""Commands as real processes: started, watched, signalled, and looked after when they are gone."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

#: Seconds after which a process that should have ended, or said something, is taken for stuck.
PATIENCE = 120.0

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Done:
    """A process that has ended."""

    status: int
    out: str
    err: str


class Command:
    """``outrider ...`` or ``swift ...`` as a child process, with its output in files."""

    def __init__(
        self,
        program: str,
        words: list[str],
        directory: Path,
        environment: Mapping[str, str] | None = None,
        to: int | None = None,
    ) -> None:
        """program: ``outrider`` or ``swift``. directory: where it runs and where its output goes. environment: what
        it has besides that of the tests. to: where its standard output goes instead, a file descriptor."""
        module = {"outrider": "outrider.cli.main", "swift": "outrider.cli.swift"}[program]
        number = len(list(directory.glob("command-*.out")))
        self._out, self._err = (directory / f"command-{number}.{end}" for end in ("out", "err"))
        variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **(environment or {})}
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                cwd=directory,
                stdout=out if to is None else to,
                stderr=err,
                env=variables,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until the standard output holds ``pattern``."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            ended = self.process.poll() is not None
            if found := self.said(pattern):
                return found
            if ended:
                break
            time.sleep(0.01)
        raise AssertionError(f"no {pattern!r} in:\n{self._out.read_text()}\n{self._err.read_text()}")

    def said(self, pattern: str) -> re.Match[str] | None:
        """Where its standard output has ``pattern`` by now."""
        return re.search(pattern, self._out.read_text(), re.MULTILINE)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process alone, and not to its children."""
        self.process.send_signal(number)

    def wait(self) -> Done:
        """Wait until it has ended."""
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"still running:\n{self._out.read_text()}\n{self._err.read_text()}") from None
        return Done(status, self._out.read_text(), self._err.read_text())

    def end(self) -> None:
        """End it if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def descendants(self) -> list[int]:
        """Its children, and theirs."""
        return list(descendants_of(self.pid))

    def segments(self) -> list[str]:
        """Names of the segments of shared memory that it has made."""
        return [path.name for path in SHARED_MEMORY.glob(f"outrider-*-{self.pid}-*")]


def descendants_of(pid: int) -> Iterator[int]:
    """Its children, and theirs."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:
        return  # gone since
    for child in children:
        yield child
        yield from descendants_of(child)


def ranks_of(launcher: int) -> dict[str, int]:
    """Process ids of a launcher's ranks."""
    found = {}
    for task in Path(f"/proc/{launcher}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread, or a child, that ends at this moment
            for pid in (task / "children").read_text().split():
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                found |= {v[5:].decode(): int(pid) for v in variables if v.startswith(b"RANK=")}
    return found


def assert_one_message(done: Done, parts: list[str]) -> None:
    """Exit status 2 and one line of explanation, without a traceback."""
    assert done.status == 2, done
    assert "Traceback" not in done.err + done.out
    (message,) = done.err.splitlines()
    assert message.startswith("outrider: ")
    missing = [part for part in parts if part not in message]
    assert not missing, message


def all_gone(pids: list[int]) -> bool:
    """Whether the processes end within ``PATIENCE``. One that nobody has reaped yet has ended too."""
    until = time.monotonic() + PATIENCE
    while any(map(_runs, pids)):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
