"""One server of the pool: whether it is up, which version it holds, and what is in flight on it."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from outrider.collector.client import ServerClient
from outrider.collector.clock import StateClock
from outrider.contract.control import ServerInfo

#: busy: rollouts in flight. idle: up, and nothing in flight. down: not up, draining, or without weights of this run.
SERVER_STATES = ("busy", "idle", "down")


def _nobody(server: "Server") -> None:
    """Watches a server that is in no pool."""


@dataclass(eq=False)
class Server:
    """One server. version: of its weights, -1 until it holds any of this run. running: rollouts in flight, of at most
    ``limit``. answered: when it last sent completions; heard: when it last sent anything, or got its first request
    after it had none; both of ``time.monotonic``.

    lost: a request failed in a way that makes one doubt that the server is up; its keeper looks and clears this.
    watch: called after every change of state or load.
    """

    client: ServerClient
    limit: int = 1
    info: ServerInfo | None = None
    alive: bool = False
    version: int = -1
    running: int = 0
    stage_seconds: float = 0.0
    commit_seconds: float = 0.0
    answered: float = float("-inf")
    heard: float = float("-inf")
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    watch: Callable[["Server"], None] = _nobody
    clock: StateClock = field(default_factory=lambda: StateClock(SERVER_STATES, "down"))

    @property
    def url(self) -> str:
        return self.client.url

    @property
    def draining(self) -> bool:
        """Whether it takes no new requests, as far as its keeper knows."""
        return self.info is not None and self.info.draining

    @property
    def ready(self) -> bool:
        """Up, taking requests, and holding weights of this run."""
        return self.alive and not self.lost.is_set() and self.version >= 0 and not self.draining

    @property
    def load(self) -> float:
        """Rollouts in flight as a share of what it takes at once."""
        return self.running / self.limit

    def occupy(self, rollouts: int) -> None:
        """``rollouts`` more are in flight here."""
        if self.running == 0:
            self.heard = time.monotonic()
        self.running += rollouts
        self._changed()

    def vacate(self, rollouts: int) -> None:
        """``rollouts`` have ended here."""
        self.running -= rollouts
        self.heard = time.monotonic()
        self._changed()

    def up(self, info: ServerInfo) -> None:
        """It has answered as the server that is needed."""
        self.info, self.alive = info, True
        self.trust()

    def describe(self, info: ServerInfo) -> None:
        """What it says of itself now."""
        self.info = info
        self._changed()

    def down(self) -> None:
        """It is gone, and with it the weights that it held."""
        self.alive, self.version = False, -1
        self.lost.clear()
        self._changed()

    def holds(self, version: int) -> None:
        """Its weights are of ``version`` now."""
        self.version = version
        self._changed()

    def doubt(self) -> None:
        """A request failed; nothing is sent here until the keeper has looked."""
        self.lost.set()
        self._changed()

    def trust(self) -> None:
        """The keeper has looked, and it is up."""
        self.lost.clear()
        self._changed()

    def _changed(self) -> None:
        busy = self.alive and self.running > 0
        self.clock.enter("busy" if busy else "idle" if self.ready else "down")
        self.watch(self)
