"""The servers of a run: who takes the next request, and what is done when one fails."""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence

import msgspec

from outrider.collector.answers import BadAnswer
from outrider.collector.client import Refused, ServerLost
from outrider.collector.ranking import Ranking
from outrider.collector.server import Server
from outrider.contract.generation import CompletionRequest, append_version
from outrider.environments.base import Completion

log = logging.getLogger(__name__)

#: Seconds before the first repetition of a request, doubled each time up to the second figure.
BACKOFF = (0.1, 5.0)


class RolloutFailed(Exception):
    """A rollout could not be had; its group is given up and the run goes on."""


class Pool:
    """Chooses servers and repeats what failed, on another one where there is another one.

    busy: servers with rollouts in flight. switched: called when that becomes none of them, or one again.
    """

    def __init__(
        self,
        servers: list[Server],
        run_id: str,
        tries: int,
        changed: Callable[[], None],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        """tries: of one request. changed: called when a server may take more work than before. decode: the text of
        token ids, as the servers make it."""
        self.servers, self.run_id, self.tries = servers, run_id, tries
        self.busy: set[Server] = set()
        self.switched: Callable[[], None] = lambda: None
        self._changed, self._decode = changed, decode
        self._ranking = Ranking()
        self._joined = asyncio.Event()
        for server in servers:
            server.watch = self._watch
            self._watch(server)

    def free_server(self, at_least: int) -> Server | None:
        """The least loaded server that holds this version or a later one, if it can take a group now."""
        server = self._ranking.least_loaded(at_least)
        return server if server is not None and server.running < server.limit else None

    async def complete(self, first: Server | None, request: CompletionRequest, at_least: int = 0) -> list[Completion]:
        """The request's ``n`` completions, from server ``first`` if it stays up. The caller has occupied ``first``
        for them; None takes the least loaded server. at_least: oldest version that a repetition may be sampled with.

        Completions that a draining server cut off go on elsewhere from the tokens there are. Raises RolloutFailed
        when the request is refused for what it is, or when its tries are used up.
        """
        completions = await self._ask(first, request, at_least)
        rests = [
            asyncio.create_task(self._go_on(completion, request, index, at_least))
            for index, completion in enumerate(completions)
            if completion.finish_reason == "abort"
        ]
        if rests:
            try:
                await asyncio.gather(*rests)
            finally:
                for rest in rests:  # when one cannot be had, the others are not needed
                    rest.cancel()
        return completions

    async def _go_on(self, completion: Completion, request: CompletionRequest, index: int, at_least: int) -> None:
        """Sample the rest of a completion that was cut off, in place.

        Two things are not as without the cut. To the server the tokens there are belong to the prompt, so presence and
        frequency penalties do not count them (the repetition penalty does). And a stop text that lies across the cut
        ends nothing there.
        """
        assert isinstance(request.prompt, list)
        assert request.max_tokens is not None
        fruitless = 0
        for attempt in itertools.count():
            done = len(completion.tokens)
            if done >= request.max_tokens:
                completion.finish_reason = "length"
            if completion.finish_reason != "abort":
                return
            rest = msgspec.structs.replace(
                request,
                prompt=[*request.prompt, *completion.tokens],
                n=1,
                max_tokens=request.max_tokens - done,
                min_tokens=max(0, request.min_tokens - done),
                # Another stream than that of the tokens there are: the engine counts from 0 again.
                seed=None if request.seed is None else (request.seed + 7919 * (index + 1) + attempt) % 2**63,
            )
            [more] = await self._ask(None, rest, at_least)
            completion.tokens += more.tokens
            completion.logprobs += more.logprobs
            for version, count in more.versions:
                append_version(completion.versions, version, count)
            # Not the sum of two texts: a character or a space may lie across the cut.
            completion.text = _until_stop(self._decode(completion.tokens), request)
            completion.finish_reason, completion.server = more.finish_reason, more.server
            fruitless = 0 if len(more.tokens) else fruitless + 1
            if fruitless > self.tries:
                raise RolloutFailed(f"cut off {fruitless} times in a row before the next token")

    async def _ask(self, first: Server | None, request: CompletionRequest, at_least: int) -> list[Completion]:
        pause, server = BACKOFF[0], first
        failed: Server | None = None
        for attempt in range(self.tries + 1):
            if server is None:
                server = await self._next_server(at_least, failed)
                server.occupy(request.n)
            try:
                completions = await server.client.complete(request, self.run_id)
                if len(completions) != request.n:
                    raise BadAnswer(f"{server.url} sent {len(completions)} completions where {request.n} were asked")
                server.answered = time.monotonic()
                return completions
            except BadAnswer as error:
                raise RolloutFailed(str(error)) from error
            except ServerLost as error:
                problem = str(error)
                server.doubt()
            except Refused as error:
                problem = f"{server.url}: {error}"
                if not error.retryable:
                    raise RolloutFailed(problem) from error
                if error.status in (409, 503):
                    # Restarted, taken over by another run, draining or broken: its keeper finds out.
                    server.doubt()
            finally:
                server.vacate(request.n)
                self._changed()
            log.info("try %d of a rollout failed: %s", attempt + 1, problem)
            server, failed = None, server
            await asyncio.sleep(pause)
            pause = min(2 * pause, BACKOFF[1])
        raise RolloutFailed(f"given up after {self.tries + 1} tries; last: {problem}")

    async def _next_server(self, at_least: int, avoid: Server | None) -> Server:
        """The least loaded server that is up and holds ``at_least`` this version; ``avoid`` only if there is no other.
        Whether to wait for ever is for ``watch_pool`` to say: it ends the run when no server has been up for
        --vllm_server_timeout."""
        while (server := self._ranking.least_loaded(at_least, avoid)) is None:
            await self._joined.wait()
        return server

    def _watch(self, server: Server) -> None:
        """A server's state or load is another."""
        if self._ranking.place(server):
            # Those that wait look again; whoever comes later waits for the next one.
            self._joined.set()
            self._joined = asyncio.Event()
        idle = not self.busy
        if server.running:
            self.busy.add(server)
        else:
            self.busy.discard(server)
        if idle != (not self.busy):
            self.switched()


def _until_stop(text: str, request: CompletionRequest) -> str:
    """The text up to the first of the request's stop texts, as a server cuts it."""
    if request.include_stop_str_in_output:
        return text
    return text[: min((at for at in map(text.find, request.stops()) if at >= 0), default=len(text))]
