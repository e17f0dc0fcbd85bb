"""Which sequences a step works on, and with how many tokens each."""

from collections import deque
from dataclasses import dataclass

from outrider.server.torch_engine.cache import SlotCache
from outrider.server.torch_engine.sequence import Request, Sequence
from outrider.server.torch_engine.slots import Slots


@dataclass
class StepPlan:
    """decoding: slots ``[0, decoding)`` take one token each. chunks: the sequences behind them, in slot order,
    take that many prompt tokens each."""

    decoding: int
    chunks: list[tuple[Sequence, int]]

    @property
    def empty(self) -> bool:
        return self.decoding == 0 and not self.chunks


class Scheduler:
    """First come, first served; decoding before prefilling; a prompt shared by several sequences is prefilled once.

    max_tokens: of one step. default_stops: the model's end-of-text tokens.
    """

    def __init__(self, slots: Slots, cache: SlotCache, max_tokens: int, default_stops: list[int]) -> None:
        self.slots, self.cache, self.max_tokens = slots, cache, max_tokens
        self.default_stops = default_stops
        self.waiting: deque[Sequence] = deque()
        # The sequence whose slot holds (or is about to hold) a prompt's keys and values under the present weights.
        self._leaders: dict[bytes, Sequence] = {}
        # Sequences that wait for their leader's prefill, by prompt.
        self._followers: dict[bytes, list[Sequence]] = {}

    def add(self, request: Request) -> None:
        """Queue a request's sequences."""
        self.waiting.extend(request.sequences)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or self.slots.used > 0

    @property
    def waiting_count(self) -> int:
        # A copy: this is asked from the event loop, while the engine's thread adds and removes.
        return len(self.waiting) + sum(map(len, list(self._followers.values())))

    def plan(self) -> StepPlan:
        """Admit what fits and share out the step's tokens."""
        self._admit()
        budget = max(self.max_tokens - self.slots.decoding, 1)
        chunks: list[tuple[Sequence, int]] = []
        for sequence in self.slots.occupants[self.slots.decoding :]:
            if budget <= 0:
                break
            count = min(sequence.remaining, budget)
            chunks.append((sequence, count))
            budget -= count
        return StepPlan(self.slots.decoding, chunks)

    def prefilled(self, sequence: Sequence) -> None:
        """A sequence's prompt is in the cache: those that wait for it may copy it, before anybody else is admitted."""
        followers = self._followers.pop(sequence.key, None)
        if followers:
            self.waiting.extendleft(reversed(followers))

    def forget(self, sequence: Sequence) -> None:
        """``sequence`` is about to leave its slot."""
        if self._leaders.get(sequence.key) is sequence:
            del self._leaders[sequence.key]
            self.prefilled(sequence)

    def weights_changed(self) -> None:
        """Keys and values computed so far belong to other weights: nobody may copy them any more."""
        self._leaders.clear()
        for followers in self._followers.values():
            self.waiting.extendleft(reversed(followers))
        self._followers.clear()

    def remove(self, request: Request) -> list[Sequence]:
        """Take a request's sequences out of the queues; returns those that are running and must be released."""
        self.waiting = deque(sequence for sequence in self.waiting if sequence.request is not request)
        for key in list(self._followers):
            self._followers[key] = [s for s in self._followers[key] if s.request is not request]
        return [sequence for sequence in request.sequences if sequence.slot >= 0]

    def _admit(self) -> None:
        while self.waiting and self.slots.free:
            sequence = self.waiting.popleft()
            leader = self._leaders.get(sequence.key)
            if leader is not None and not leader.prefilled:
                self._followers.setdefault(sequence.key, []).append(sequence)
                continue
            if leader is None:
                self._leaders[sequence.key] = sequence
                sequence.cached = 0
            else:
                # The last prompt token is computed anew: its hidden state gives the first token's distribution.
                sequence.cached = len(sequence.prompt) - 1
            sampling = sequence.request.sampling
            slot = self.slots.occupy(sequence, [*self.default_stops, *sampling.stop_token_ids])
            if leader is not None and sequence.cached:
                self.cache.copy(leader.slot, slot, sequence.cached)
