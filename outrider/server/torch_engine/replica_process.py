"""One replica, seen from the front: its process, the conversation with it, and what it is known to be doing."""

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess

import msgspec
import zmq
import zmq.asyncio

from outrider.server.torch_engine.forking import signals_waiting
from outrider.server.torch_engine.messages import FromFront, FromReplica, Load, Quit, ReplicaSpec
from outrider.server.torch_engine.replica import main

#: Seconds that a replica is given to end after it was told to.
_FAREWELL = 5.0


class ReplicaProcess:
    """A replica's process. on_message and on_death are called on the event loop; on_death once, with the exit code."""

    def __init__(
        self,
        spec: ReplicaSpec,
        context: ForkServerContext,
        on_message: Callable[["ReplicaProcess", FromReplica], None],
        on_death: Callable[["ReplicaProcess", int | None], None],
    ) -> None:
        self.spec = spec
        self.load = Load()
        self._on_message, self._on_death = on_message, on_death
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(FromReplica).decode
        self._directory = tempfile.mkdtemp(prefix="outrider-replica-")
        endpoint = f"ipc://{self._directory}/pair"
        self._zmq = zmq.asyncio.Context()
        self._socket = self._zmq.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(endpoint)
        self.process: BaseProcess = context.Process(target=main, args=(endpoint, spec), name=spec.name, daemon=True)
        self._started: asyncio.Future[None] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self) -> None:
        """Start the process, off the event loop: the first one has to import torch."""
        loop = asyncio.get_running_loop()
        self._started = loop.run_in_executor(None, self._start_process)
        await asyncio.shield(self._started)
        self._reader = loop.create_task(self._read())
        loop.add_reader(self.process.sentinel, self._died)

    def _start_process(self) -> None:
        with signals_waiting():
            self.process.start()

    @property
    def pid(self) -> int | None:
        return self.process.pid

    def send(self, message: FromFront) -> None:
        """Queue a message; never waits."""
        if not self._closed:
            self._socket.send(self._encode(message))

    def kill(self) -> None:
        """End it at once; ``on_death`` follows."""
        self.process.kill()

    async def stop(self) -> None:
        """End it, in order if possible."""
        if self._started is not None:
            await asyncio.shield(self._started)  # whoever awaited it first may have been cancelled
        if self.process.pid is None:
            self.close()
            return
        self._forget()
        self.send(Quit())
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self.process.join, _FAREWELL)
        if self.process.is_alive():
            self.process.kill()
            await loop.run_in_executor(None, self.process.join, _FAREWELL)
        self.close()

    def close(self) -> None:
        """Release the socket; the process has ended."""
        if self._closed:
            return
        self._closed = True
        if self._reader is not None:
            self._reader.cancel()
        self._socket.close()
        self._zmq.term()
        self._remove_directory()

    async def _read(self) -> None:
        message = await self._socket.recv()
        # Both ends have the socket now; nobody needs its name, and a server that is killed leaves nothing behind.
        self._remove_directory()
        while True:
            self._on_message(self, self._decode(message))
            message = await self._socket.recv()

    def _remove_directory(self) -> None:
        with contextlib.suppress(OSError):
            for name in os.listdir(self._directory):
                os.unlink(os.path.join(self._directory, name))
            os.rmdir(self._directory)

    def _forget(self) -> None:
        with contextlib.suppress(ValueError, OSError):
            asyncio.get_running_loop().remove_reader(self.process.sentinel)

    def _died(self) -> None:
        self._forget()
        # What it said last may still be on its way through the socket's own thread.
        asyncio.get_running_loop().call_later(0.05, self._buried)

    def _buried(self) -> None:
        if not self._closed:
            self.process.join(0)
            code = self.process.exitcode
            self.close()
            self._on_death(self, code)
