"""Starts vLLM's server, hands on what it logs, says when it is ready, and ends it."""

import asyncio
import contextlib
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from http import HTTPStatus
from http.client import HTTPException
from urllib.request import ProxyHandler, Request, build_opener

import msgspec
import uvicorn
import uvloop

from outrider.contract import routes
from outrider.contract.control import ServerInfo
from outrider.contract.errors import UserError
from outrider.contract.output import say
from outrider.server.config import RolloutConfig
from outrider.server.connections import http_settings
from outrider.server.ready import ready_message
from outrider.server.vllm_engine import guard
from outrider.server.vllm_engine.command import VllmCommand, check_installed, engines_per_device, vllm_command
from outrider.server.vllm_engine.router import Backend, Router
from outrider.server.vllm_engine.settings import CANNOT_START
from outrider.weights.segments import segment_directory

log = logging.getLogger(__name__)

#: Seconds between two looks whether the server answers, and after which one is asked for in vain.
_INTERVAL, _PATIENCE = 0.1, 5.0
#: Lines of the log that are kept to find out why a start failed.
_KEPT_LINES = 4000
_PREFIX = re.compile(r"^(\([^)]*\) )*([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?")
_EXCEPTION = re.compile(r"^((\w+\.)*\w*(Error|Exception|Interrupt|Exit))(: .*)?$")


def visible_gpus() -> list[int]:
    """Memory of each GPU that this process sees, bytes."""
    import torch

    return [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]


def serve_vllm(config: RolloutConfig, listener: socket.socket, key: str) -> int:
    """Run vLLM's server, or several behind a router, until it is told to stop. Returns the exit status. listener:
    holds the port until vLLM takes it over, or serves the router. Raises UserError."""
    if warning := check_installed():
        say(f"outrider: warning: {warning}")
    host, port = listener.getsockname()[:2]
    gpus = visible_gpus()
    count = engines_per_device(config, gpus)
    places = [(host, port)] if count == 1 else [("127.0.0.1", _free_port()) for _ in range(count)]
    directories = [tempfile.mkdtemp(prefix="outrider-vllm-", dir=segment_directory()) for _ in places]
    children: list[_Child] = []
    try:
        if count == 1:
            listener.close()
        for (at, where), directory in zip(places, directories, strict=True):
            command = vllm_command(config, at, where, key, directory, gpus, count)
            children.append(_Child(config, command, at, where, key, directory))
        launch = _Launch(config, children, warning)
        if count == 1:
            return launch.run(host, port)
        return launch.run_behind(Router([Backend(where) for _, where in places], key), listener)
    finally:
        for child in children:
            child.kill()
        listener.close()
        for directory in directories[len(children) :]:  # of servers that were not even started
            shutil.rmtree(directory, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def describe_command(command: VllmCommand) -> str:
    """What --dry_run prints, without the key."""
    hidden = {name: "(hidden)" if name.endswith("KEY") else value for name, value in command.environment.items()}
    environment = "\n".join(f"    {name}={shlex.quote(value)}" for name, value in hidden.items())
    return f"environment\n{environment}\n\ncommand\n    {shlex.join(command.arguments)}"


class _Child:
    """One vLLM server: its log, whether it answers, and its end."""

    def __init__(
        self, config: RolloutConfig, command: VllmCommand, host: str, port: int, key: str, directory: str
    ) -> None:
        self.config, self.host, self.port, self.key = config, host, port, key
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.told_to_stop = False
        self.process = subprocess.Popen(
            command.arguments,
            env={**os.environ, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # A group, so that Ctrl-C is for this process to answer, but no session: Linux shares the cores out among
            # sessions, and workers that spin in one of their own kept others from running for seconds.
            process_group=0,
        )
        #: Ends vLLM's processes and removes their directory when this process closes its end of the pipe, or is gone.
        self._guard = subprocess.Popen(
            [sys.executable, "-I", guard.__file__, str(self.process.pid), directory],
            stdin=subprocess.PIPE,
            bufsize=0,  # closed by a signal handler, too
            process_group=0,
        )
        self._reader = threading.Thread(target=self._hand_on, daemon=True)
        self._reader.start()

    def wait_until_ready(self) -> ServerInfo | None:
        """What the server says of itself; None when it has ended before."""
        reach = f"[{self.host}]" if ":" in self.host else self.host
        reach = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(reach, reach)
        request = Request(f"http://{reach}:{self.port}{routes.INFO}", headers={"Authorization": f"Bearer {self.key}"})
        direct = build_opener(ProxyHandler({}))  # the key is not for a proxy
        while self.process.poll() is None:
            try:
                with direct.open(request, timeout=_PATIENCE) as answer:
                    if answer.status == HTTPStatus.OK:
                        return msgspec.json.decode(answer.read(), type=ServerInfo)
            except (OSError, HTTPException):
                pass
            time.sleep(_INTERVAL)
        return None

    def stop(self) -> None:
        """Have it drain and end; a second time, cut off what is running."""
        self.told_to_stop = True
        self.process.send_signal(signal.SIGTERM)

    def cut_off(self) -> None:
        """Begin to end it, whatever it is doing, and all that it has started. Does not wait: a signal handler may have
        come upon somebody who does."""
        self.told_to_stop = True
        assert self._guard.stdin is not None
        self._guard.stdin.close()

    def kill(self) -> None:
        """End it, whatever it is doing, and all that it has started."""
        self.cut_off()
        self._guard.wait()
        with contextlib.suppress(ProcessLookupError):  # there is no guard any more if it was killed itself
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(_PATIENCE)

    def wait(self) -> int:
        """Its exit status, when all of its log has been handed on."""
        status = self.process.wait()
        self._reader.join(_PATIENCE)
        return status

    def _hand_on(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.decode(errors="replace").rstrip("\n")
            self.lines.append(text)
            # What vLLM's libraries say of themselves at the end helps nobody.
            if not self.told_to_stop or self.config.log_level == "debug":
                with contextlib.suppress(OSError):  # nobody reads it any more; vLLM must not wait for that
                    print(text, file=sys.stderr, flush=True)


class _Launch:
    """All children together, until they are told to stop or one of them ends."""

    def __init__(self, config: RolloutConfig, children: list[_Child], warning: str | None) -> None:
        """warning: about this vLLM, for a start that fails: it may be the reason."""
        self.config, self.children, self.warning = config, children, warning
        self.stopping, self._signals = False, 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())

    def stop(self) -> None:
        """The first signal drains, a second one cuts off what is running, and a third one ends at once."""
        self.stopping = True
        self._signals += 1
        for child in self.children:
            if self._signals > 2:
                child.cut_off()
            else:
                child.stop()

    def run(self, host: str, port: int) -> int:
        """With one child that listens on the port itself. Returns the exit status. Raises UserError."""
        info = self._wait_until_ready()
        if info is not None:
            print(ready_message(info, self.config, host, port), flush=True)
        return self._wait()

    def run_behind(self, router: Router, listener: socket.socket) -> int:
        """With several children behind ``router``. Returns the exit status. Raises UserError."""
        info = self._wait_until_ready()
        if info is None:
            return self._wait()
        info.max_num_seqs *= len(self.children)
        host, port = listener.getsockname()[:2]
        server = uvicorn.Server(http_settings(router.asgi()))
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]

        async def serve() -> None:
            await router.start()
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop)
            serving = loop.create_task(server.serve(sockets=[listener]))
            print(ready_message(info, self.config, host, port), flush=True)
            while any(child.process.poll() is None for child in self.children) and not self._lost():
                await asyncio.sleep(_INTERVAL)
            server.should_exit = True
            await serving
            await router.close()

        uvloop.run(serve())
        return self._wait()

    def _lost(self) -> bool:
        """Whether a child has ended that was not told to."""
        return not self.stopping and any(child.process.poll() is not None for child in self.children)

    def _wait_until_ready(self) -> ServerInfo | None:
        """What the last child says of itself, when all answer. Raises UserError; None when they are to stop."""
        info = None
        for child in self.children:
            info = child.wait_until_ready()
            if info is None:
                child.wait()
                if self.stopping:
                    return None
                suspicion = f" ({self.warning})" if self.warning else ""
                raise UserError(f"--engine vllm: its server did not start: {root_cause(child.lines)}{suspicion}")
        return info

    def _wait(self) -> int:
        while not self._lost() and any(child.process.poll() is None for child in self.children):
            time.sleep(_INTERVAL)
        for child in self.children:
            if not self.stopping and child.process.poll() is not None:
                status = child.wait()
                log.error("vLLM's server has ended with status %d: %s", status, root_cause(child.lines))
        return 0 if self.stopping else 1


def root_cause(lines: Sequence[str]) -> str:
    """The reason that the middleware gives; else the first exception of a log that says something: what follows it are
    processes that fail because of it."""
    for line in lines:
        if CANNOT_START in line:
            return line.partition(CANNOT_START)[2]
    bare = [_PREFIX.sub("", line).strip() for line in lines]
    causes = [line for line in bare if _EXCEPTION.match(line)]
    # Whoever waits for a process that failed says so, too.
    followers = ("RuntimeError: Engine core", "KeyboardInterrupt")
    telling = [line for line in causes if ":" in line and not line.startswith(followers)]
    for line in [*telling, *causes]:
        return line
    return next((line for line in reversed(bare) if line), "it said nothing")
