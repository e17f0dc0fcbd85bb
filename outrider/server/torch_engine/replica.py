"""A replica: a process that holds one copy of the model and does what the front tells it."""

import logging
import os
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import parent_process
from multiprocessing.connection import wait
from typing import cast

import msgspec
import torch
import zmq
from torch import nn

from outrider.contract.errors import UserError
from outrider.contract.garbage import search_less_often
from outrider.server.torch_engine.core import EngineCore
from outrider.server.torch_engine.loading import load_model
from outrider.server.torch_engine.messages import (
    Abort,
    Commit,
    Committed,
    Crashed,
    FromFront,
    FromReplica,
    Hello,
    Quit,
    ReplicaSpec,
    Stage,
    Staged,
    Step,
    Submit,
)

log = logging.getLogger(__name__)

#: Seconds between two reports of the load while nothing else is told, and between two looks at a stage under way.
REPORT_INTERVAL = 0.25
_STAGE_POLL = 0.005


def main(endpoint: str, spec: ReplicaSpec) -> None:
    """Entry point of the process. endpoint: ZeroMQ address on which the front listens."""
    threading.Thread(target=_die_with_front, name="watch", daemon=True).start()
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.setsockopt(zmq.LINGER, 2000)
    socket.connect(endpoint)
    send = _sender(socket)
    try:
        if spec.threads:
            torch.set_num_threads(spec.threads)
        core = EngineCore(load_model(spec), spec)
        parameters = core.weights.live
        send(
            Hello(
                tensors=[(name, tuple(parameter.shape)) for name, parameter in parameters.items()],
                vocab_size=cast(nn.Embedding, core.runner.model.get_input_embeddings()).num_embeddings,
            )
        )
        Replica(core, socket).run()
    except UserError as error:
        send(Crashed(message=str(error), user_error=True))
    except Exception as error:  # noqa: BLE001 - the last resort: the front must hear why
        send(Crashed(message=f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        context.destroy()
        os._exit(1)
    context.destroy()


def _die_with_front() -> None:
    """End at once when the front is gone, however it went. It is not the parent in the kernel's sense, the process
    that replicas are forked from is, and that one lives as long as any replica does."""
    front = parent_process()
    if front is not None:
        wait([front.sentinel])
        os._exit(1)


class Replica:
    """The loop: messages, a step, news; until told to quit."""

    def __init__(self, core: EngineCore, socket: "zmq.Socket[bytes]") -> None:
        self.core, self.socket = core, socket
        self._send = _sender(socket)
        self._decode = msgspec.msgpack.Decoder(FromFront).decode
        self._stager = ThreadPoolExecutor(1, thread_name_prefix="stage")
        self._staging: Future[None] | None = None
        self._commit: Commit | None = None
        self._quit = False
        self._idle_seconds = 0.0
        self._reported = 0.0

    def run(self) -> None:
        """Work until :class:`Quit` comes."""
        search_less_often()
        core = self.core
        while not self._quit:
            self._receive(wait=not core.has_work)
            self._look_at_stage()
            if self._commit is not None:
                self._try_commit(self._commit)
            if core.has_work:
                core.step()
            self._tell()

    def _receive(self, wait: bool) -> None:
        if wait and not self.socket.poll(0):
            # Told now that it is idle, so that the front need not guess.
            self._tell(force=True)
            started = time.monotonic()
            self.socket.poll(int(1000 * (_STAGE_POLL if self._staging else 1.0)))
            self._idle_seconds += time.monotonic() - started
            self._reported = 0.0  # that it works again is told at once as well
        while self.socket.poll(0):
            message = self._decode(self.socket.recv())
            match message:
                case Submit():
                    self.core.submit(message)
                case Abort():
                    self.core.abort(message)
                case Stage():
                    self._staging = self._stager.submit(self.core.weights.stage, message)
                case Commit():
                    self._commit = message
                case Quit():
                    self._quit = True

    def _look_at_stage(self) -> None:
        if self._staging is None or not self._staging.done():
            return
        error = self._staging.exception()
        self._staging = None
        self._send(Staged(error=None if error is None else f"{type(error).__name__}: {error}"))

    def _try_commit(self, commit: Commit) -> None:
        if commit.inflight == "wait" and not self.core.close_admission():
            return
        seconds = self.core.commit(commit.version, commit.inflight)
        self._commit = None
        self._send(Committed(version=commit.version, seconds=seconds))

    def _tell(self, force: bool = False) -> None:
        updates = self.core.take_updates()
        now = time.monotonic()
        if updates or force or now - self._reported > REPORT_INTERVAL:
            self._reported = now
            self._send(Step(updates=updates, load=self.core.load(self._idle_seconds)))


def _sender(socket: "zmq.Socket[bytes]") -> Callable[[FromReplica], None]:
    encode = msgspec.msgpack.Encoder().encode

    def send(message: FromReplica) -> None:
        socket.send(encode(message))

    return send
