"""Real server processes, one function per engine: an engine that is added to ``STARTERS`` takes all contract tests."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from outrider.contract import routes
from outrider.contract.keys import KEY_VARIABLE

#: Seconds a server may take to load a model, and to end. Generous: they only end a test that hangs.
READY_DEADLINE = 300.0
END_DEADLINE = 60.0

_READY = re.compile(r"^ready: .* on ([^ ]+):(\d+),", re.MULTILINE)


@dataclass
class Server:
    """A running ``outrider rollout``. output: what it has printed so far lies there."""

    engine: str
    model: Path
    host: str
    port: int
    process: subprocess.Popen[bytes]
    output: Path

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def terminate(self) -> None:
        """Ask it to drain and end."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Its exit status."""
        return self.process.wait(END_DEADLINE)

    def kill(self) -> None:
        """End it, whatever it is doing."""
        self.process.kill()
        self.process.wait(END_DEADLINE)


#: ``start(model, directory, *flags, key=None)``: a server that is ready. directory: takes its output. key: handed
#: over in the environment; without one, the server keeps a key file.
Starter = Callable[..., Server]


def start_torch(model: Path, directory: Path, *flags: str, key: str | None = None) -> Server:
    """A server with the embedded engine. One thread: several servers share the cores of a test machine."""
    return _start("torch", model, directory, ["--threads", "1", *flags], key)


def start_vllm(model: Path, directory: Path, *flags: str, key: str | None = None) -> Server:
    """A server with real vLLM, on the CPU."""
    return _start("vllm", model, directory, ["--threads", "1", "--kv_cache_gib", "0.25", *flags], key)


def start_vllm_twice(model: Path, directory: Path, *flags: str, key: str | None = None) -> Server:
    """Two servers with vLLM behind one port."""
    return start_vllm(model, directory, "--engines_per_device", "2", *flags, key=key)


STARTERS: dict[str, Starter] = {"torch": start_torch, "vllm": start_vllm, "vllm twice": start_vllm_twice}
#: vLLM takes half a minute to start, and is not always installed: `make test-vllm` asks for it.
ENGINES = os.environ.get("OUTRIDER_TEST_ENGINES", "torch").split(",")


def command(model: Path | str, *flags: str) -> list[str]:
    """The command line of a server."""
    return [sys.executable, "-m", "outrider.cli.main", "rollout", "--model", str(model), *flags]


def environment(key: str | None) -> dict[str, str]:
    """The environment of a server: a key of the caller's own must not get into it."""
    inherited = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    return inherited if key is None else {**inherited, KEY_VARIABLE: key}


def _start(engine: str, model: Path, directory: Path, flags: list[str], key: str | None) -> Server:
    """Start it on a free loopback port, and read from its ready message which one that is."""
    output = directory / "server.log"
    arguments = command(model, "--engine", engine, "--host", "127.0.0.1", "--port", "0", *flags)
    with output.open("wb") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, env=environment(key))
    deadline = time.monotonic() + READY_DEADLINE
    while not (ready := _READY.search(output.read_text())):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            process.wait(END_DEADLINE)
            raise RuntimeError(f"the server is not ready, exit status {process.returncode}:\n{output.read_text()}")
        time.sleep(0.05)
    server = Server(engine, model, ready[1], int(ready[2]), process, output)
    with urlopen(server.url + routes.HEALTH, timeout=END_DEADLINE) as answer:
        assert answer.status == 200
    return server
