"""The process that sends weights by NCCL, seen from the collector: orders with deadlines."""

import asyncio
import os
import sys

import msgspec

from outrider.contract.keys import KEY_VARIABLE
from outrider.weights.nccl_orders import Done, Order


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

    async def order(self, order: Order, deadline: float) -> None:
        """Have an order carried out. deadline: seconds. Raises LinkFailed; the process is then gone, and what it held
        and was connected to with it."""
        async with self._turn:
            name = type(order).__name__.lower()
            try:
                async with asyncio.timeout(deadline):
                    problem = await self._ask(order)
            except TimeoutError:
                problem = f"not done within {deadline:g} s"
            except asyncio.CancelledError:
                await self.close()
                raise
            if problem is not None:
                await self.close()
                raise LinkFailed(f"{name} weights over NCCL: {problem}" if name != "connect" else f"connect: {problem}")

    async def _ask(self, order: Order) -> str | None:
        """What went wrong, or None."""
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "outrider.weights.nccl_sender", env={**os.environ, KEY_VARIABLE: self._key},
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(order) + b"\n")
            await process.stdin.drain()
        except ConnectionError:
            pass  # it is gone, as reading shows
        line = await process.stdout.readline()
        if not line:
            return f"the sending process ended with status {await process.wait()}; the collector's log says why"
        return msgspec.json.decode(line, type=Done).error

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()
