"""The process that sends weights by NCCL, seen from the collector: orders with deadlines."""

import asyncio
import contextlib
import os
import sys

import msgspec

from outrider.contract.keys import KEY_VARIABLE
from outrider.weights.nccl_orders import Done, Load, Order


class LinkFailed(Exception):
    """The sending process did not do what it was told, or not in time."""


class NcclLink:
    """Starts the process when it is first needed. What is not answered in time has hung for good, so the process is
    killed: NCCL waits for ever for a peer that has gone."""

    def __init__(self, key: str) -> None:
        """key: for weights that lie on other hosts."""
        self._key = key
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    @property
    def alive(self) -> bool:
        """Whether there is a process, with what it holds and is connected to."""
        return self._process is not None and self._process.returncode is None

    async def order(self, order: Order, deadline: float) -> None:
        """Have an order carried out. deadline: seconds. Raises LinkFailed; where no answer came, or the group is in no
        defined state, the process is gone then."""
        async with self._turn:
            try:
                async with asyncio.timeout(deadline):
                    problem = await self._ask(order)
            except TimeoutError:
                problem = f"not done within {deadline:g} s"
                await self.close()
            except asyncio.CancelledError:
                await self.close()
                raise
            if problem is not None:
                if not isinstance(order, Load):
                    await self.close()
                raise LinkFailed(f"{type(order).__name__.lower()}, in the process that sends: {problem}")

    async def _ask(self, order: Order) -> str | None:
        """What went wrong, or None."""
        try:
            if self._process is None:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "outrider.weights.nccl_sender", env={**os.environ, KEY_VARIABLE: self._key},
                    stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C, which lets a step end, must not end a broadcast
                )  # fmt: skip
            process = self._process
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(ConnectionError):  # it is gone, as reading shows
                process.stdin.write(msgspec.json.encode(order) + b"\n")
                await process.stdin.drain()
            line = await process.stdout.readline()
            if not line:
                return f"it ended with status {await process.wait()}; the collector's log says why"
            return msgspec.json.decode(line, type=Done).error
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            return f"{type(error).__name__}: {error}"

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()
