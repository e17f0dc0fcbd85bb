"""A request to vLLM: one vLLM request a choice, begun anew where a commit demands it."""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Protocol

from outrider.contract.arrays import pack_floats, pack_ints
from outrider.contract.generation import FinishReason, VersionSpan, append_version
from outrider.contract.sampling import SamplingParams
from outrider.server.engine import ChoiceDelta, Unavailable
from outrider.server.vllm_engine.tokens import Tokens


class Choice:
    """One completion being made.

    done: tokens of earlier requests to vLLM, which the current one, ``request_id``, continues; those of them that
    have not been handed on yet are in ``unsent``, with ``spans`` of their versions. version: of the weights when the
    current request was submitted; marks: ``(tokens, version)``, the version from that token of it on. given: tokens
    of it that have come. ended: its last ones have. restart: how many of its tokens stay when it is begun anew; None
    while it may go on.
    """

    def __init__(self, prompt: list[int], sampling: SamplingParams, index: int, name: str, seed: int | None) -> None:
        self.prompt, self.sampling, self.index, self.name, self.seed = prompt, sampling, index, name, seed
        self.done: list[int] = []
        self.unsent, self.spans = Tokens(), list[VersionSpan]()
        self.attempt = 0
        self.engine = 0
        self.version = 0
        self.marks: list[tuple[int, int]] = []
        self.given = 0
        self.ended = False
        self.restart: int | None = None

    @property
    def request_id(self) -> str:
        """Of the current request to vLLM."""
        return f"{self.name}-{self.index}-{self.attempt}"

    @property
    def divisible(self) -> bool:
        """Whether tokens of the completion may become part of a prompt without changing what is drawn after them."""
        return not (self.sampling.presence_penalty or self.sampling.frequency_penalty)

    def submitted(self, version: int) -> None:
        """A request to vLLM begins with the weights of ``version`` in use."""
        self.version, self.marks, self.given, self.ended, self.restart = version, [], 0, False, None

    def versions(self, start: int, end: int) -> list[VersionSpan]:
        """Of tokens ``start`` to ``end`` of the current request."""
        spans: list[VersionSpan] = []
        version = self.version
        for count, following in [*self.marks, (end, 0)]:
            append_version(spans, version, min(count, end) - start)
            start, version = max(start, count), following
        return spans

    def begin_anew(self, tokens: Tokens, sent: int) -> None:
        """Keep as many of the current request's tokens as is demanded, of which ``sent`` have been handed on; the next
        request continues after them."""
        count = max(min(self.restart or 0, len(tokens.ids)), sent)
        for version, length in self.versions(sent, count):
            append_version(self.spans, version, length)
        self.unsent.add(tokens.slice(sent, count, self.sampling.alternatives))
        self.done += tokens.ids[:count]
        self.attempt += 1


class Keeper(Protocol):
    """Whoever has the request answered."""

    def stream(self, choice: Choice, by_token: bool) -> AsyncGenerator[tuple[Tokens, FinishReason | None], None]:
        """Submit the choice to vLLM, and give its tokens as they come."""
        ...

    async def admit(self, choice: Choice) -> bool:
        """Wait for a place; False when the choice is cut off before it has got one."""
        ...

    async def settled(self) -> None:
        """Wait while a commit decides what becomes of requests in flight."""
        ...

    def leave(self, choice: Choice) -> None:
        """The choice needs its place no more."""
        ...

    def forget(self, generation: "VllmGeneration") -> None:
        """A request has ended, in whatever way."""
        ...


class VllmGeneration:
    """A request being answered; see ``Generation``."""

    def __init__(self, keeper: Keeper, choices: list[Choice], by_token: bool) -> None:
        self.keeper, self.by_token = keeper, by_token
        self._deltas: asyncio.Queue[ChoiceDelta | Exception] = asyncio.Queue()
        self._tasks = {choice.index: asyncio.create_task(self._complete(choice)) for choice in choices}
        for index, task in self._tasks.items():
            task.add_done_callback(lambda _, index=index: self._ended(index))  # type: ignore[misc]

    def __aiter__(self) -> AsyncIterator[ChoiceDelta]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[ChoiceDelta]:
        while self._tasks or not self._deltas.empty():
            item = await self._deltas.get()
            if isinstance(item, Exception):
                raise item
            yield item

    def end_choice(self, index: int) -> None:
        if task := self._tasks.get(index):
            task.cancel()

    def close(self) -> None:
        for task in list(self._tasks.values()):
            task.cancel()

    def fail(self, error: Exception) -> None:
        """It cannot be finished."""
        self._deltas.put_nowait(error)
        self.close()

    def _ended(self, index: int) -> None:
        self._tasks.pop(index, None)
        if not self._tasks:
            self.keeper.forget(self)

    async def _complete(self, choice: Choice) -> None:
        try:
            if not await self.keeper.admit(choice):
                self._put(choice, Tokens(), 0, "abort")
                return
            while not await self._request(choice):
                pass
        except Exception as error:  # noqa: BLE001 - whoever reads the deltas must hear it
            self.fail(error)
        finally:
            self.keeper.leave(choice)

    async def _request(self, choice: Choice) -> bool:
        """One request to vLLM; False when it has to be followed by another one."""
        tokens, sent = Tokens(), 0
        async with aclosing(self.keeper.stream(choice, self.by_token)) as stream:
            async for more, finish_reason in stream:
                tokens.add(more)
                choice.given, choice.ended = len(tokens.ids), finish_reason in ("stop", "length")
                await self.keeper.settled()
                # One that had come to its end before it was to be begun anew is not continued beyond it.
                if choice.restart is not None and not (choice.ended and choice.restart >= len(tokens.ids)):
                    break
                if self.by_token or finish_reason:
                    self._put(choice, tokens, sent, finish_reason)
                    sent = len(tokens.ids)
            else:
                return True
        choice.begin_anew(tokens, sent)
        return False

    def _put(self, choice: Choice, tokens: Tokens, start: int, finish_reason: FinishReason | None) -> None:
        """Hand on the tokens of the current request from ``start`` on, and what of earlier ones was not yet."""
        end = len(tokens.ids)
        news, spans = tokens.slice(start, end, choice.sampling.alternatives), choice.versions(start, end)
        for place, value in enumerate(news.logprobs):
            if not math.isfinite(value):
                version = choice.versions(start + place, start + place + 1)[0][0]
                raise Unavailable(
                    f"weights of version {version} give probabilities that are not finite (has the training diverged?)"
                )
        if choice.unsent.ids:
            for version, count in spans:
                append_version(choice.spans, version, count)
            choice.unsent.add(news)
            news, spans = choice.unsent, choice.spans
            choice.unsent, choice.spans = Tokens(), []
        self._deltas.put_nowait(
            ChoiceDelta(
                index=choice.index,
                token_ids=pack_ints(news.ids),
                logprobs=pack_floats(news.logprobs),
                versions=spans,
                top_ids=pack_ints(news.top_ids),
                top_logprobs=pack_floats(news.top_logprobs),
                finish_reason=finish_reason,
            )
        )
