"""A request to the embedded engine, from its submission to its last token."""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from outrider.server.engine import ChoiceDelta
from outrider.server.torch_engine.dispatch import prefix_key
from outrider.server.torch_engine.fleet import Replica
from outrider.server.torch_engine.messages import Progress, Submit


class Keeper(Protocol):
    """Whoever has the request answered."""

    def abort(self, generation: "TorchGeneration", index: int | None) -> None:
        """Stop a request, or one choice of it, wherever it is."""
        ...

    def forget(self, generation: "TorchGeneration") -> None:
        """A request has ended, in whatever way."""
        ...


class TorchGeneration:
    """A request being answered; see ``Generation``."""

    def __init__(self, keeper: Keeper, submit: Submit) -> None:
        self.keeper, self.submit = keeper, submit
        self.key = prefix_key(submit.prompt)
        self.replica: Replica | None = None
        self.issues = 0
        #: Choices that have not ended.
        self.open = set(range(submit.n))
        self.progress = [Progress() for _ in range(submit.n)]
        self._deltas: asyncio.Queue[ChoiceDelta | Exception] = asyncio.Queue()
        self._closed = False

    def __aiter__(self) -> AsyncIterator[ChoiceDelta]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[ChoiceDelta]:
        while self.open or not self._deltas.empty():
            item = await self._deltas.get()
            if isinstance(item, Exception):
                raise item
            yield item

    def end_choice(self, index: int) -> None:
        if index in self.open:
            self.keeper.abort(self, index)
            self._choice_ended(index)

    def close(self) -> None:
        if not self._closed and self.open:
            self.keeper.abort(self, None)
            for index in list(self.open):
                self._choice_ended(index)
        self._closed = True

    def put(self, delta: ChoiceDelta) -> None:
        """Tokens have come."""
        if delta.index not in self.open:
            return
        if self.submit.stream:
            so_far = self.progress[delta.index]
            so_far.token_ids += delta.token_ids
            so_far.logprobs += delta.logprobs
            so_far.versions = [*so_far.versions, *delta.versions]
        self._deltas.put_nowait(delta)
        if delta.finish_reason is not None:
            self._choice_ended(delta.index)

    def fail(self, error: Exception) -> None:
        """It cannot be finished."""
        self._deltas.put_nowait(error)
        for index in list(self.open):
            self._choice_ended(index)

    def cut_off(self) -> None:
        """It ends with what has been reported so far."""
        for index in list(self.open):
            self.put(ChoiceDelta(index=index, finish_reason="abort"))

    def _choice_ended(self, index: int) -> None:
        self.open.discard(index)
        self.progress[index].ended = True
        if self.replica is not None:
            self.replica.sequences -= 1
        if not self.open:
            self.keeper.forget(self)
