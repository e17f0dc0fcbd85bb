"""The servers of a run: who is up, who holds which version, and who takes the next request."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from outrider.collector.client import Refused, ServerClient, ServerLost
from outrider.contract.control import ServerInfo
from outrider.contract.generation import CompletionChoice, CompletionRequest, append_version, version_spans_total
from outrider.environments.base import Completion

log = logging.getLogger(__name__)

#: Seconds before the first repetition of a request, doubled each time up to the second figure.
BACKOFF = (0.1, 5.0)


class RolloutFailed(Exception):
    """A rollout could not be had; its group is given up and the run goes on."""


@dataclass(eq=False)
class Server:
    """One server. version: of its weights, -1 until it holds any of this run. running: rollouts in flight.

    lost: a request failed in a way that makes one doubt that the server is up; its keeper looks and clears this.
    """

    client: ServerClient
    info: ServerInfo | None = None
    alive: bool = False
    version: int = -1
    running: int = 0
    limit: int = 1
    stage_seconds: float = 0.0
    commit_seconds: float = 0.0
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    _idle_since: float = field(default_factory=time.monotonic)
    _idle_seconds: float = 0.0

    @property
    def url(self) -> str:
        return self.client.url

    @property
    def ready(self) -> bool:
        """Up, taking requests, and holding weights of this run."""
        return self.alive and not self.lost.is_set() and self.version >= 0 and not self.draining

    @property
    def draining(self) -> bool:
        """Whether it takes no new requests, as far as its keeper knows."""
        return self.info is not None and self.info.draining

    @property
    def load(self) -> float:
        """Rollouts in flight as a share of what it takes at once."""
        return self.running / self.limit

    def occupy(self, rollouts: int) -> None:
        """``rollouts`` more are in flight here."""
        if self.running == 0:
            self._idle_seconds += time.monotonic() - self._idle_since
        self.running += rollouts

    def vacate(self, rollouts: int) -> None:
        """``rollouts`` have ended here."""
        self.running -= rollouts
        if self.running == 0:
            self._idle_since = time.monotonic()

    def idle_seconds(self) -> float:
        """Seconds without any rollout in flight, since the start."""
        return self._idle_seconds + (time.monotonic() - self._idle_since if self.running == 0 else 0.0)


class Pool:
    """Chooses servers and repeats what failed, on another one where there is another one."""

    def __init__(
        self,
        servers: list[Server],
        run_id: str,
        tries: int,
        changed: Callable[[], None],
        decode: Callable[[list[int]], str],
    ) -> None:
        """tries: of one request. changed: called when a server may take more work than before. decode: the text of
        token ids, as the servers make it."""
        self.servers, self.run_id, self.tries = servers, run_id, tries
        self._changed, self._decode = changed, decode

    def free_servers(self) -> list[Server]:
        """Servers that can take a group now, least loaded first, newest version first among equals."""
        ready = [server for server in self.servers if server.ready and server.running < server.limit]
        return sorted(ready, key=lambda server: (server.load, -server.version))

    async def complete(self, first: Server | None, request: CompletionRequest, at_least: int = 0) -> list[Completion]:
        """The request's ``n`` completions, from server ``first`` if it stays up. The caller has occupied ``first``
        for them; None takes the least loaded server. at_least: oldest version that a repetition may be sampled with.

        Completions that a draining server cut off go on elsewhere from the tokens there are. Raises RolloutFailed
        when the request is refused for what it is, or when its tries are used up.
        """
        choices, server = await self._ask(first, request, at_least)
        completions = [_completion(choice, server) for choice in choices]
        rests = [
            asyncio.create_task(self._go_on(completion, request, index, at_least))
            for index, completion in enumerate(completions)
            if completion.finish_reason == "abort"
        ]
        try:
            await asyncio.gather(*rests)
        finally:
            for rest in rests:  # when one cannot be had, the others are not needed
                rest.cancel()
        return completions

    async def _go_on(self, completion: Completion, request: CompletionRequest, index: int, at_least: int) -> None:
        """Sample the rest of a completion that was cut off, in place."""
        assert isinstance(request.prompt, list)
        for attempt in range(self.tries + 1):
            left = request.max_tokens - len(completion.tokens)
            if left <= 0:
                completion.finish_reason = "length"
            if completion.finish_reason != "abort":
                return
            rest = CompletionRequest(
                prompt=request.prompt + completion.tokens,
                max_tokens=left,
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=request.top_k,
                # Another stream than that of the tokens there are: the engine counts from 0 again.
                seed=None if request.seed is None else (request.seed + 7919 * (index + 1) + attempt) % 2**63,
                logprobs=0,
                return_token_ids=True,
            )
            [choice], server = await self._ask(None, rest, at_least)
            more = _completion(choice, server)
            completion.tokens += more.tokens
            completion.logprobs += more.logprobs
            for version, count in more.versions:
                append_version(completion.versions, version, count)
            # Not the sum of two texts: a character or a space may lie across the cut.
            completion.text = self._decode(completion.tokens)
            completion.finish_reason, completion.server = more.finish_reason, more.server
        raise RolloutFailed(f"cut off {self.tries + 1} times by draining servers")

    async def _ask(
        self, first: Server | None, request: CompletionRequest, at_least: int
    ) -> tuple[list[CompletionChoice], Server]:
        pause, server = BACKOFF[0], first
        for attempt in range(self.tries + 1):
            if server is None:
                server = await self._next_server(at_least)
                server.occupy(request.n)
            try:
                choices = (await server.client.complete(request, self.run_id)).choices
                if len(choices) != request.n:
                    raise RolloutFailed(f"{server.url} sent {len(choices)} completions where {request.n} were asked")
                return choices, server
            except ServerLost as error:
                problem = str(error)
                server.lost.set()
            except Refused as error:
                problem = f"{server.url}: {error}"
                if not error.retryable:
                    raise RolloutFailed(problem) from error
                if error.status in (409, 503):
                    # Restarted, taken over by another run, draining or broken: its keeper finds out.
                    server.lost.set()
            finally:
                server.vacate(request.n)
                self._changed()
            log.info("try %d of a rollout failed: %s", attempt + 1, problem)
            server = None
            await asyncio.sleep(pause)
            pause = min(2 * pause, BACKOFF[1])
        raise RolloutFailed(f"given up after {self.tries + 1} tries; last: {problem}")

    async def _next_server(self, at_least: int) -> Server:
        """The least loaded server that is up and holds ``at_least`` this version. Whether to wait for ever is for
        ``watch_pool`` to say: it ends the run when no server has been up for --vllm_server_timeout."""
        while True:
            ready = [server for server in self.servers if server.ready and server.version >= at_least]
            if ready:
                return min(ready, key=lambda server: server.load)
            await asyncio.sleep(0.1)


def _completion(choice: CompletionChoice, server: Server) -> Completion:
    """Check what a server sent. Raises RolloutFailed when tokens, log-probabilities and versions do not match."""
    tokens = choice.token_ids
    logprobs = choice.logprobs.token_logprobs if choice.logprobs else None
    versions = choice.weight_versions
    if tokens is None or logprobs is None or versions is None:
        raise RolloutFailed(f"{server.url} left out token ids, log-probabilities or versions")
    if not len(tokens) == len(logprobs) == version_spans_total(versions):
        raise RolloutFailed(
            f"{server.url} sent {len(tokens)} tokens with {len(logprobs)} log-probabilities and "
            f"{version_spans_total(versions)} versions"
        )
    return Completion(tokens, logprobs, list(versions), choice.text, choice.finish_reason, server.url)
