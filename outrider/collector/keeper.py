"""One keeper a server: finds out whether it lives, and brings the newest version to it."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from outrider.collector.client import Refused, ServerLost
from outrider.collector.preflight import Expected, check_server
from outrider.collector.server import Server
from outrider.contract.control import ServerInfo
from outrider.contract.errors import UserError
from outrider.contract.manifest import Manifest

log = logging.getLogger(__name__)

#: Seconds between two probes of a server that is up, and of one that is down.
HEARTBEAT = 2.0
REVIVAL = 0.5
#: Probes in a row that must fail before a server counts as down: one may be late on a loaded machine.
MISSED = 2
#: Seconds without an answer after which a server that owes some is asked whether it works on them. How long a rollout
#: takes says nothing; that nothing runs where something should does.
SILENCE = 30.0


class Keeper:
    """Keeps one server at the newest version, and takes it back into the pool when it returns."""

    def __init__(
        self,
        server: Server,
        expected: Expected,
        newest: Callable[[], Manifest | None],
        changed: Callable[[], None],
        notice: Callable[[str], None],
        fail: Callable[[str], None],
    ) -> None:
        """newest: the manifest that servers should hold. changed: called when the server's version or state is
        another. notice: tells the user something. fail: ends the run."""
        self.server, self.expected, self.newest = server, expected, newest
        self.changed, self.notice, self.fail = changed, notice, fail
        self.wake = asyncio.Event()
        self._stage_failures = 0

    async def run(self) -> None:
        """Keep the server until cancelled."""
        while True:
            if not self.server.alive:
                await self._revive()
            manifest = self.newest()
            try:
                if manifest is not None and manifest.version != self.server.version:
                    await self._update(manifest)
                else:
                    await self._wait()
            except ServerLost as error:
                await self._lose(str(error))
            except Refused as error:
                await self._on_refusal(error)

    async def _update(self, manifest: Manifest) -> None:
        """Stage, commit, and tell: from here on new tokens are of this version."""
        client = self.server.client
        status = await client.stage(manifest)
        self.server.stage_seconds += status.stage_seconds
        status = await client.commit(manifest.run_id, manifest.version, self.expected.inflight)
        self.server.commit_seconds += status.commit_seconds
        self.server.holds(manifest.version)
        self._stage_failures = 0
        self.changed()

    async def _on_refusal(self, error: Refused) -> None:
        """A stage or commit was refused; the old weights are in use. A newer version may be out by now."""
        self._stage_failures += 1
        manifest = self.newest()
        version = manifest.version if manifest else "?"
        log.warning("%s refused version %s: %s", self.server.url, version, error.message)
        if self._stage_failures >= 5:
            self.fail(
                f"server {self.server.url} refused version {version} of the weights {self._stage_failures} times: "
                f"{error.message}"
            )
            return
        await asyncio.sleep(REVIVAL)

    async def _wait(self) -> None:
        """Sleep until there is a new version, a request has failed, or it is time for a probe; then probe, unless the
        server has answered requests of this run in the meantime: that is proof enough."""
        waits = [asyncio.create_task(self.wake.wait()), asyncio.create_task(self.server.lost.wait())]
        done, pending = await asyncio.wait(waits, timeout=HEARTBEAT, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if self.wake.is_set():
            self.wake.clear()
            return
        if done:  # a request failed: look at once
            await self._probe()
            self.server.trust()
            return
        now = time.monotonic()
        if now - self.server.answered < HEARTBEAT:
            return
        for attempt in range(MISSED):
            try:
                await self._probe()
                break
            except ServerLost:
                if attempt == MISSED - 1:
                    raise
        if self.server.running and now - self.server.heard > SILENCE:
            await self._look_for_requests()

    async def _probe(self) -> None:
        """Raises ServerLost when the server is gone, or holds other weights than it was given: it was restarted."""
        try:
            info = await self._look()
        except UserError as error:  # started again, as one that cannot be used: the others go on
            raise ServerLost(str(error)) from error
        manifest = self.newest()
        if manifest is not None and (info.run_id, info.version) != (manifest.run_id, self.server.version):
            raise ServerLost(
                f"{self.server.url} holds version {info.version} of run {info.run_id or 'none'!r} instead of version "
                f"{self.server.version} of {manifest.run_id!r}: it was restarted, or another trainer uses it"
            )
        if self.server.info is not None and info.draining != self.server.info.draining:
            self.notice(f"server {self.server.url} " + ("is draining" if info.draining else "takes requests again"))
        self.server.describe(info)
        self.changed()

    async def _look_for_requests(self) -> None:
        """Raises ServerLost when the server knows nothing of the requests that it has not answered."""
        try:
            known = await self.server.client.requests()
        except Refused:
            return  # it does not tell
        if known == 0:
            raise ServerLost(
                f"{self.server.url} says that no request runs or waits there, while {self.server.running} rollouts "
                f"have been waiting for its answer for more than {SILENCE:g} s"
            )

    async def _look(self) -> ServerInfo:
        """Who answers there. Raises ServerLost when nobody does, or only a server whose engine has stopped."""
        try:
            await self.server.client.health()
        except Refused as error:
            raise ServerLost(f"{self.server.url} is not healthy: {error}") from error
        return await self.server.client.info()

    async def _lose(self, reason: str) -> None:
        self.server.down()
        await self.server.client.drop_requests()
        self.notice(f"server lost: {reason}")
        self.changed()

    async def _revive(self) -> None:
        """Probe until the server answers as the one that is needed."""
        since, complaint = time.monotonic(), ""
        while True:
            try:
                info = await self._look()
                check_server(self.server.url, info, self.expected)
                break
            except ServerLost:
                pass
            except (Refused, UserError) as error:
                if str(error) != complaint:
                    complaint = str(error)
                    self.notice(f"server {self.server.url} is back but cannot be used: {complaint}")
            await asyncio.sleep(REVIVAL)
        self.server.up(info)
        self.notice(f"server {self.server.url} is back after {time.monotonic() - since:.0f} s")
        self.changed()


async def watch_pool(servers: Sequence[Server], timeout: float) -> None:
    """Raises UserError when no server has been up, and taking requests, for ``timeout`` seconds
    (--vllm_server_timeout)."""
    seen = time.monotonic()
    while True:
        await asyncio.sleep(0.5)
        if any(server.alive and not server.draining for server in servers):
            seen = time.monotonic()
        elif time.monotonic() - seen > timeout:
            urls = ", ".join(server.url for server in servers)
            raise UserError(
                f"no rollout server has been up for --vllm_server_timeout {timeout:g} s ({urls}): start one again "
                "and go on with --resume_from_checkpoint auto"
            )
