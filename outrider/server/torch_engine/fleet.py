"""The replicas of an engine as the front sees them: started, asked, watched, and started anew when they die."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from outrider.contract.errors import UserError
from outrider.server.engine import Unavailable
from outrider.server.torch_engine.forking import replica_context
from outrider.server.torch_engine.messages import (
    Abort,
    Commit,
    Crashed,
    FromReplica,
    Hello,
    Load,
    ReplicaSpec,
    Stage,
    Step,
    Submit,
    Update,
)
from outrider.server.torch_engine.replica_process import ReplicaProcess

log = logging.getLogger(__name__)

#: Seconds for a replica to load its model.
LOAD_DEADLINE = 1800.0
#: Seconds without a word from a replica that has work, after which it counts as stuck and is killed.
SILENCE = 300.0
#: Deaths in a row after which a replica is not started anew, unless it has served for so many seconds before.
MAX_DEATHS, SERVED = 6, 5.0


class Replica:
    """One place for a replica, and the process that holds it now.

    ready: it holds the weights in use. requests: numbers of those that are there. sequences: of these requests.
    unreported_tokens: of requests that its latest report did not know of yet. deaths: in a row, none of which came
    after it had served for a while. before: counters of the processes that are gone.
    """

    def __init__(self, spec: ReplicaSpec) -> None:
        self.spec = spec
        self.process: ReplicaProcess | None = None
        self.ready = False
        self.requests: set[int] = set()
        self.sequences = self.unreported_tokens = 0
        self.deaths = 0
        self.before = Load()
        self.ready_since = math.inf
        self.heard = time.monotonic()
        self.answer: asyncio.Future[FromReplica] | None = None

    @property
    def load(self) -> Load:
        return self.process.load if self.process is not None else Load()

    @property
    def tokens(self) -> int:
        """Tokens that it works on, as far as is known."""
        return self.load.tokens + self.unreported_tokens

    @property
    def full(self) -> bool:
        """Whether more requests would only wait there. A few may, so that a slot that gets free is not empty for the
        time of a message."""
        return self.sequences >= self.spec.max_num_seqs + max(1, self.spec.max_num_seqs // 8)

    def send(self, message: Submit | Abort) -> None:
        """Queue a message; lost when the replica is dead, whose requests are issued again anyway."""
        if self.process is not None:
            self.process.send(message)

    async def ask(self, message: Stage | Commit, deadline: float | None, what: str) -> FromReplica:
        """What it says to an order. Raises Unavailable when it dies, or does not answer in ``deadline`` seconds."""
        if self.process is None:
            raise Unavailable(f"{self.spec.name} has died")
        self.process.send(message)
        return await self.hear(deadline, what)

    async def hear(self, deadline: float | None, what: str) -> FromReplica:
        """As :meth:`ask`, without asking."""
        self.answer = asyncio.get_running_loop().create_future()
        try:
            return await asyncio.wait_for(self.answer, deadline)
        except TimeoutError as error:
            raise Unavailable(f"waited {deadline:g} s for {self.spec.name} {what} in vain") from error
        finally:
            self.answer = None

    def settle(self, outcome: FromReplica | Exception) -> None:
        """What is being waited for has come, or will not."""
        if self.answer is None or self.answer.done():
            return
        if isinstance(outcome, Exception):
            self.answer.set_exception(outcome)
        else:
            self.answer.set_result(outcome)


class Fleet:
    """All replicas. A dead one is started anew, brought to the weights in use, and given back.

    The callbacks run on the event loop. on_update: news of a request. on_room: more requests may be sent. on_orphans:
    numbers of the requests that a dead replica had. on_failure: nothing works any more, and why. equip: brings a new
    process to the weights in use; raises Unavailable.
    """

    def __init__(
        self,
        specs: Iterable[ReplicaSpec],
        *,
        on_update: Callable[[Update], None],
        on_room: Callable[[], None],
        on_orphans: Callable[[set[int]], None],
        on_failure: Callable[[str], None],
        equip: Callable[[Replica], Awaitable[None]],
    ) -> None:
        self.replicas = [Replica(spec) for spec in specs]
        self.restarts = 0
        self._on_update, self._on_room, self._on_orphans = on_update, on_room, on_orphans
        self._on_failure, self._equip = on_failure, equip
        self._context = replica_context()
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def ready(self) -> list[Replica]:
        """Those that serve."""
        return [replica for replica in self.replicas if replica.ready]

    async def start(self) -> list[Hello]:
        """Start all of them; they serve from :meth:`serve` on. Raises UserError, Unavailable."""
        starts = [asyncio.create_task(self._start(replica)) for replica in self.replicas]
        try:
            return list(await asyncio.gather(*starts))
        except BaseException:
            for task in starts:
                task.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self.close()
            raise

    def serve(self) -> None:
        """All hold the weights in use."""
        for replica in self.replicas:
            self._serve(replica)
        self._spawn(self._watch())

    async def close(self) -> None:
        """End all processes."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(r.process.stop() for r in self.replicas if r.process is not None))

    async def _start(self, replica: Replica) -> Hello:
        """Start a replica's process and wait until its model is loaded."""
        replica.process = ReplicaProcess(replica.spec, self._context, self._on_message, self._on_death)
        await replica.process.start()
        answer = await replica.hear(LOAD_DEADLINE, "to load the model")
        assert isinstance(answer, Hello)
        return answer

    def _serve(self, replica: Replica) -> None:
        replica.ready, replica.ready_since = True, time.monotonic()
        self._on_room()

    async def _watch(self) -> None:
        """Kill what is stuck; its death is then dealt with as any other."""
        while True:
            await asyncio.sleep(SILENCE / 20)
            for replica in self.ready:
                silent = time.monotonic() - replica.heard
                if replica.requests and silent > SILENCE and replica.process is not None:
                    log.error("%s has been silent for %.0f s with work to do: it is killed", replica.spec.name, silent)
                    replica.process.kill()

    def _of(self, process: ReplicaProcess) -> Replica | None:
        return next((replica for replica in self.replicas if replica.process is process), None)

    def _on_message(self, process: ReplicaProcess, message: FromReplica) -> None:
        replica = self._of(process)
        if replica is None:
            return
        replica.heard = time.monotonic()
        match message:
            case Step(updates=updates, load=load):
                process.load = load
                replica.unreported_tokens = 0
                for update in updates:
                    self._on_update(update)
                self._on_room()
            case Crashed(message=text, user_error=mendable):
                log.error("%s crashed: %s", replica.spec.name, text)
                replica.settle(UserError(text) if mendable else Unavailable(text.splitlines()[0]))
            case _:
                replica.settle(message)

    def _on_death(self, process: ReplicaProcess, code: int | None) -> None:
        replica = self._of(process)
        if replica is None or self._closing:
            return
        was_ready, orphans = replica.ready, replica.requests
        replica.before = add_counters(replica.before, process.load)
        replica.ready, replica.process = False, None
        replica.sequences, replica.unreported_tokens, replica.requests = 0, 0, set()
        log.error("%s died with exit code %s; %d requests are issued again", replica.spec.name, code, len(orphans))
        replica.settle(Unavailable(f"{replica.spec.name} died with exit code {code}"))
        self._on_orphans(orphans)
        if was_ready and self._may_go_on(replica, f"exit code {code}"):
            self._spawn(self._restart(replica))
        self._on_room()

    def _may_go_on(self, replica: Replica, reason: str) -> bool:
        """Count a death. False, and the end of the engine, when a replica does nothing but die."""
        if time.monotonic() - replica.ready_since > SERVED:
            replica.deaths = 0
        replica.ready_since = math.inf
        replica.deaths += 1
        if replica.deaths < MAX_DEATHS:
            return True
        self._on_failure(
            f"the engine stopped: {replica.spec.name} died {replica.deaths} times in a row, last: {reason}"
        )
        return False

    async def _restart(self, replica: Replica) -> None:
        self.restarts += 1
        while True:
            try:
                await self._start(replica)
                await self._equip(replica)
            except (Unavailable, UserError) as error:
                log.error("%s cannot be started: %s", replica.spec.name, error)
                if replica.process is not None:
                    await replica.process.stop()
                    replica.process = None
                if not self._may_go_on(replica, str(error)):
                    return
                await asyncio.sleep(1.0)
            else:
                log.info("%s is back", replica.spec.name)
                self._serve(replica)
                return

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def add_counters(a: Load, b: Load) -> Load:
    """Counters of two loads together; what is running now counts no more."""
    names = ("generated_tokens", "steps", "prefix_queries", "prefix_hits", "preemptions", "idle_seconds")
    return Load(**{name: getattr(a, name) + getattr(b, name) for name in names})
