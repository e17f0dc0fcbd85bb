"""The collector, seen from the trainer: a child process and the conversation with it."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec
import zmq

from outrider.contract.errors import UserError
from outrider.contract.feed import (
    Batch,
    EvalResult,
    EvaluateRequest,
    Failure,
    FromCollector,
    FromTrainer,
    Notice,
    PoolStatus,
    Published,
    Reach,
    Reached,
    Ready,
    Stop,
    WeightNode,
)
from outrider.contract.manifest import Manifest
from outrider.observe.panel import Panel

#: What makes a process a rank.
_RANK = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
         "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID")  # fmt: skip
#: Seconds between two looks at whether the collector lives and whether to stop.
_POLL = 0.2
#: Seconds without any message after which the collector counts as stuck. It sends its status twice a second.
SILENCE = 120.0
#: Seconds that the collector is given to end in order.
FAREWELL = 15.0


class Interrupted(Exception):
    """The user asked for an end while the trainer was waiting."""


class CollectorLink:
    """Starts the collector, and hands out what it sends in the order in which the trainer wants it."""

    def __init__(self, panel: Panel, interrupted: Callable[[], bool], log: Path) -> None:
        """interrupted: whether to give up waiting. log: file that takes the collector's own output."""
        self._panel, self._interrupted, self._log_path = panel, interrupted, log
        self._batches: deque[Batch] = deque()
        self._evaluations: deque[EvalResult] = deque()
        self._ready: Ready | None = None
        self._reached = False
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(FromCollector).decode
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._directory = tempfile.mkdtemp(prefix="outrider-")
        self._endpoint = f"ipc://{self._directory}/feed"
        self._announcer: zmq.Socket[bytes] | None = None
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._heard = time.monotonic()

    def start(self, spec: bytes) -> None:
        """Start the child. spec: an encoded ``CollectorSpec``. Raises UserError, Interrupted."""
        self._socket.bind(self._endpoint)
        self._log = open(self._log_path, "ab")  # noqa: SIM115 - it is the child's as long as the child lives
        # One thread: the collector computes nothing, and idle thread pools of its libraries cost the trainer cores.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        for name in _RANK:  # the collector, and with it a user's reward functions, is no rank of the trainer
            environment.pop(name, None)
        command = [sys.executable, "-m", "outrider.collector.process", self._endpoint, str(os.getpid())]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=environment)
        # A message to nobody would wait for ever: the child may have died before it got as far as to connect.
        while not self._socket.poll(int(_POLL * 1000), zmq.POLLOUT):
            if self._interrupted():
                raise Interrupted
            self._check_alive("it to start")
        self._socket.send(spec)
        self._heard = time.monotonic()

    def use_panel(self, panel: Panel) -> None:
        """Show what the collector says on this panel from now on."""
        self._panel = panel

    def send(self, message: FromTrainer) -> None:
        """Tell the collector something; never waits. Whoever waits for the answer hears that it is gone."""
        with contextlib.suppress(zmq.Again):
            self._socket.send(self._encode(message), zmq.DONTWAIT)

    def ready(self, deadline: float) -> Ready:
        """What the collector found in its preflight. deadline: seconds. Raises UserError, Interrupted."""
        self._wait(lambda: self._ready is not None, "the collector to find servers and data", deadline)
        assert self._ready is not None
        return self._ready

    def check_reach(self, nodes: list[WeightNode], deadline: float) -> None:
        """Have servers find out whether they can fetch weights from these nodes. deadline: seconds. Raises UserError
        where one cannot, Interrupted."""
        if nodes:
            self.send(Reach(nodes=nodes))
            self._wait(lambda: self._reached, "the servers to reach the weights of all nodes", deadline)

    def batch(self) -> Batch:
        """The next batch, waiting as long as the collector lives and speaks. Raises UserError, Interrupted."""
        self._wait(lambda: bool(self._batches), "a batch", None)
        return self._batches.popleft()

    def evaluation(self, deadline: float) -> EvalResult:
        """The next evaluation's result. deadline: seconds. Raises UserError, Interrupted."""
        self._wait(lambda: bool(self._evaluations), "the evaluation", deadline)
        return self._evaluations.popleft()

    def arrived_evaluations(self) -> list[EvalResult]:
        """Results that came in the meantime."""
        while self._socket.poll(0):
            self._take(self._socket.recv())
        results = list(self._evaluations)
        self._evaluations.clear()
        return results

    def announce(self, manifest: Manifest) -> None:
        """Tell the collector that a version is ready. For the publisher's thread alone: the trainer's own thread is
        busy with the next step by then, and a socket belongs to one thread."""
        if self._announcer is None:
            self._announcer = self._context.socket(zmq.PUSH)
            self._announcer.setsockopt(zmq.LINGER, 0)
            self._announcer.set_hwm(0)
            self._announcer.connect(f"{self._endpoint}-versions")
        self._announcer.send(self._encode(Published(manifest=manifest)))

    def request_evaluation(self, step: int, version: int) -> None:
        """Ask for an evaluation of ``version`` or later."""
        self.send(EvaluateRequest(step=step, version=version))

    def stop(self, reason: str) -> None:
        """End the child: in order if it can, within ``FAREWELL`` seconds at the most. Before it is ready it has
        nothing to bring to an end, and listens to nobody."""
        if self._ready is None:
            self.kill()
            return
        if self._process is not None and self._process.poll() is None:
            self.send(Stop(reason=reason))
            try:
                self._process.wait(FAREWELL)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self.close()

    def kill(self) -> None:
        """End the child at once."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self.close()

    def abandon(self) -> None:
        """As :meth:`kill`, on any thread of a process that ends at once: sockets are left to the thread that they
        belong to."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
        self._remove_directory()

    def close(self) -> None:
        """Release socket, log and directory; safe to call twice."""
        self._socket.close()
        if self._announcer is not None:
            self._announcer.close()
        self._context.term()
        if self._log is not None:
            self._log.close()
        self._remove_directory()

    def _remove_directory(self) -> None:
        with contextlib.suppress(OSError):
            for name in os.listdir(self._directory):
                os.unlink(os.path.join(self._directory, name))
            os.rmdir(self._directory)

    def _wait(self, done: Callable[[], bool], what: str, deadline: float | None) -> None:
        until = None if deadline is None else time.monotonic() + deadline
        # Here and not at the last message: the trainer does not listen while it computes.
        self._heard = time.monotonic()
        while not done():
            if self._socket.poll(int(_POLL * 1000)):
                self._heard = time.monotonic()
                self._take(self._socket.recv())
                continue
            if self._interrupted():
                raise Interrupted
            now = time.monotonic()
            self._check_alive(what)
            if now - self._heard > SILENCE and self._ready is not None:
                raise UserError(f"the collector has been silent for {SILENCE:g} s; its log is {self._log_path}")
            if until is not None and now > until:
                raise UserError(f"waited {deadline:g} s for {what} in vain; the collector's log is {self._log_path}")

    def _check_alive(self, what: str) -> None:
        """Raises UserError when the child has ended, unless something that it said has not been read yet."""
        if self._process is None or self._process.poll() is None or self._socket.poll(0):
            return
        raise UserError(
            f"the collector process ended with exit code {self._process.returncode} while the trainer waited for "
            f"{what}; its log is {self._log_path}"
        )

    def _take(self, data: bytes) -> None:
        match self._decode(data):
            case Batch() as batch:
                self._batches.append(batch)
            case EvalResult() as result:
                self._evaluations.append(result)
            case PoolStatus() as status:
                self._panel.pool(status)
            case Notice(text=text):
                self._panel.notice(text)
            case Ready() as ready:
                self._ready = ready
            case Reached():
                self._reached = True
            case Failure(message=message):
                raise UserError(message)
