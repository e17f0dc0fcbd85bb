"""A process that verifies published versions for another one, which has clients to answer meanwhile.

Reading gigabytes keeps the kernel busy with the memory of the process that does it, and whatever else that process does
waits for it: seen were streams that stood still for a second. One line of JSON asks, one answers.
"""

import socket
import subprocess
import sys
import threading

import msgspec

from outrider.contract.lifetime import die_with_parent
from outrider.contract.manifest import Manifest
from outrider.weights.checksums import FetchError, Segments

#: Seconds for a version; a hundred gigabytes take half a minute.
DEADLINE = 300.0


class Answer(msgspec.Struct):
    """problem: what :class:`FetchError` says, None where the bytes are right."""

    problem: str | None = None


class Checker:
    """The process, as whoever started it sees it. Calls come one at a time; any thread may make them."""

    def __init__(self) -> None:
        self._start()  # so that the first version need not wait for it
        self._one = threading.Lock()

    def check(self, manifest: Manifest) -> None:
        """Verify all pieces of a version whose segments are on this host. Raises FetchError."""
        with self._one:
            if self._process.poll() is not None:
                self._connection.close()
                self._start()
            answer = self._ask(manifest)
        if answer.problem is not None:
            raise FetchError(answer.problem)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def _start(self) -> None:
        # Not a pipe: writing to one has no deadline, and a manifest is longer than what a pipe holds.
        self._connection, other = socket.socketpair()
        self._connection.settimeout(DEADLINE)
        with other:
            command = [sys.executable, "-m", "outrider.weights.checker"]
            self._process = subprocess.Popen(command, stdin=other.fileno(), stdout=other.fileno())

    def _ask(self, manifest: Manifest) -> Answer:
        line, problem = b"", None
        try:
            self._connection.sendall(msgspec.json.encode(manifest) + b"\n")
            while not line.endswith(b"\n") and (more := self._connection.recv(65536)):
                line += more
        except TimeoutError:
            problem = f"gave no answer within {DEADLINE:g} s"
        except OSError:
            pass  # it is gone
        if not line.endswith(b"\n"):
            self._process.kill()
            status = self._process.wait()
            problem = problem or f"ended with status {status}"
            raise FetchError(f"the process that verifies checksums {problem}; another one verifies the next version")
        return msgspec.json.decode(line, type=Answer)


def main() -> None:
    """Answer until nobody asks any more."""
    die_with_parent()
    segments = Segments()
    for line in sys.stdin.buffer:
        answer = Answer()
        try:
            segments.check(msgspec.json.decode(line, type=Manifest))
        except FetchError as error:
            answer.problem = str(error)
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
