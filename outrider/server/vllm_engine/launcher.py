"""Starts vLLM's server, hands on what it logs, says when it is ready, and ends it."""

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
from http import HTTPStatus
from urllib.request import Request, urlopen

import msgspec

from outrider.contract import routes
from outrider.contract.control import ServerInfo
from outrider.contract.errors import UserError
from outrider.contract.lifetime import die_with_parent
from outrider.server.config import RolloutConfig
from outrider.server.ready import ready_message
from outrider.server.vllm_engine.command import VllmCommand, check_installed, vllm_command
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
    """Run vLLM's server until it is told to stop. Returns the exit status. listener: holds the port until vLLM takes
    it over. Raises UserError."""
    warning = check_installed()
    if warning:
        log.warning("%s", warning)
    directory = tempfile.mkdtemp(prefix="outrider-vllm-", dir=segment_directory())
    try:
        host, port = listener.getsockname()[:2]
        command = vllm_command(config, port, key, directory, visible_gpus())
        listener.close()
        return _Server(config, command, host, port, key).run()
    finally:
        listener.close()
        shutil.rmtree(directory, ignore_errors=True)


def describe_command(command: VllmCommand) -> str:
    """What --dry_run prints, without the key."""
    hidden = {name: "(hidden)" if name.endswith("KEY") else value for name, value in command.environment.items()}
    environment = "\n".join(f"    {name}={shlex.quote(value)}" for name, value in hidden.items())
    return f"environment\n{environment}\n\ncommand\n    {shlex.join(command.arguments)}"


class _Server:
    """The child process: its log, its end, and whether it answers."""

    def __init__(self, config: RolloutConfig, command: VllmCommand, host: str, port: int, key: str) -> None:
        self.config, self.command, self.host, self.port, self.key = config, command, host, port, key
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.told_to_stop = False

    def run(self) -> int:
        """Raises UserError when it does not get as far as to answer."""
        child = subprocess.Popen(
            self.command.arguments,
            env={**os.environ, **self.command.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Ctrl-C is for this process to answer; and none is left behind when it is killed.
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop(child))
        reader = threading.Thread(target=self._hand_on, args=(child,), daemon=True)
        reader.start()
        info = self._wait_until_ready(child)
        if info is not None:
            print(ready_message(info, self.config, self.host, self.port), flush=True)
        status = child.wait()
        reader.join(_PATIENCE)
        if self.told_to_stop:
            return 0
        if info is None:
            raise UserError(f"--engine vllm: its server did not start: {root_cause(self.lines)}")
        log.error("vLLM's server has ended with status %d: %s", status, root_cause(self.lines))
        return 1

    def _stop(self, child: subprocess.Popen[bytes]) -> None:
        self.told_to_stop = True
        child.send_signal(signal.SIGTERM)

    def _hand_on(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            text = line.decode(errors="replace").rstrip("\n")
            self.lines.append(text)
            # What vLLM's libraries say of themselves at the end helps nobody.
            if not self.told_to_stop or self.config.log_level == "debug":
                print(text, file=sys.stderr, flush=True)

    def _wait_until_ready(self, child: subprocess.Popen[bytes]) -> ServerInfo | None:
        """What the server says of itself; None when it has ended before."""
        reach = f"[{self.host}]" if ":" in self.host else self.host
        reach = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(reach, reach)
        request = Request(f"http://{reach}:{self.port}{routes.INFO}", headers={"Authorization": f"Bearer {self.key}"})
        while child.poll() is None:
            try:
                with urlopen(request, timeout=_PATIENCE) as answer:
                    if answer.status == HTTPStatus.OK:
                        return msgspec.json.decode(answer.read(), type=ServerInfo)
            except OSError:
                pass
            time.sleep(_INTERVAL)
        return None


def root_cause(lines: "deque[str]") -> str:
    """The first exception of a log that says something: what follows it are processes that fail because of it."""
    bare = [_PREFIX.sub("", line).strip() for line in lines]
    causes = [line for line in bare if _EXCEPTION.match(line)]
    # Whoever waits for a process that failed says so, too.
    followers = ("RuntimeError: Engine core", "KeyboardInterrupt")
    telling = [line for line in causes if ":" in line and not line.startswith(followers)]
    for line in [*telling, *causes]:
        return line
    return next((line for line in reversed(bare) if line), "it said nothing")
