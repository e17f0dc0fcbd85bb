"""A process that verifies published versions for another one, which has clients to answer meanwhile.

Reading gigabytes keeps the kernel busy with the memory of the process that does it, and whatever else that process does
waits for it: seen were streams that stood still for a second. One line of JSON asks, one answers.
"""

import select
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
        self._process = self._start()  # so that the first version need not wait for it
        self._one = threading.Lock()

    def check(self, manifest: Manifest) -> None:
        """Verify all pieces of a version whose segments are on this host. Raises FetchError."""
        with self._one:
            if self._process.poll() is not None:
                self._process = self._start()
            answer = self._ask(self._process, manifest)
        if answer.problem is not None:
            raise FetchError(answer.problem)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    @staticmethod
    def _start() -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "outrider.weights.checker"]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    @staticmethod
    def _ask(process: "subprocess.Popen[bytes]", manifest: Manifest) -> Answer:
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        try:
            process.stdin.write(msgspec.json.encode(manifest) + b"\n")
            process.stdin.flush()
            if select.select([process.stdout], [], [], DEADLINE)[0]:
                line = process.stdout.readline()
        except OSError:  # it is gone, and will be started anew
            pass
        if not line.endswith(b"\n"):
            process.kill()
            status = process.wait()
            raise FetchError(f"the process that verifies checksums gave no answer (status {status})")
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
