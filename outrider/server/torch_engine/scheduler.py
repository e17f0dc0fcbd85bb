"""Which sequences a step works on, and with how many tokens each."""

from collections import deque
from dataclasses import dataclass

import numpy as np

from outrider.server.torch_engine.cache import SlotCache, round_positions
from outrider.server.torch_engine.prefix import PrefixCache
from outrider.server.torch_engine.sequence import Request, Sequence
from outrider.server.torch_engine.slots import Slots


@dataclass
class StepPlan:
    """decoding: slots ``[0, decoding)`` take one token each. chunks: the sequences behind them, in slot order,
    take that many tokens of their prompts each."""

    decoding: int
    chunks: list[tuple[Sequence, int]]

    @property
    def empty(self) -> bool:
        return self.decoding == 0 and not self.chunks


class Scheduler:
    """First come, first served; decoding before prefilling; a prompt shared by several sequences is prefilled once.

    When running sequences outgrow the cache, those that came last give up their slots and go on later from the tokens
    they have.
    """

    def __init__(
        self, slots: Slots, cache: SlotCache, prefixes: PrefixCache, max_tokens: int, default_stops: list[int]
    ) -> None:
        """max_tokens: of one step. default_stops: the model's end-of-text tokens."""
        self.slots, self.cache, self.prefixes, self.max_tokens = slots, cache, prefixes, max_tokens
        self.default_stops = default_stops
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0
        #: While set, nobody begins: a commit waits for those to end that have begun.
        self.closed = False
        # The sequence whose slot holds (or is about to hold) a prompt's keys and values under the present weights.
        self._leaders: dict[bytes, Sequence] = {}
        # Sequences that wait for their leader's prefill, by prompt.
        self._followers: dict[bytes, list[Sequence]] = {}

    def add(self, request: Request) -> None:
        """Queue a request's sequences."""
        self.waiting.extend(sequence for sequence in request.sequences if not sequence.ended)

    @property
    def has_work(self) -> bool:
        return self.slots.used > 0 or self._next() is not None

    def _next(self) -> Sequence | None:
        """Who is to be admitted next."""
        if not self.waiting or (self.closed and not self.waiting[0].generated):
            return None
        return self.waiting[0]

    @property
    def waiting_count(self) -> int:
        return len(self.waiting) + sum(map(len, self._followers.values()))

    def plan(self) -> StepPlan:
        """Admit what fits and share out the step's tokens."""
        self._admit()
        slots = self.slots
        self._make_room(1 + int(slots.length[: slots.decoding].max(initial=0)))
        budget = max(self.max_tokens - slots.decoding, 1)
        chunks: list[tuple[Sequence, int]] = []
        for sequence in slots.occupants[slots.decoding :]:
            if budget <= 0:
                break
            count = min(sequence.remaining, budget)
            chunks.append((sequence, count))
            budget -= count
        return StepPlan(slots.decoding, chunks)

    def prefilled(self, sequence: Sequence) -> None:
        """A sequence's prompt is in the cache: those that wait for it may copy it, before anybody else is admitted."""
        followers = self._followers.pop(sequence.key, None)
        if followers:
            self.waiting.extendleft(reversed(followers))

    def take_out(self, sequence: Sequence) -> None:
        """``sequence`` leaves its slot, for good or for a while."""
        if self._leaders.get(sequence.key) is sequence:
            del self._leaders[sequence.key]
            self.prefilled(sequence)
        self.slots.take_out(sequence, self.cache)

    def weights_changed(self, recompute: bool) -> None:
        """Keys and values computed so far belong to other weights: nobody may copy them any more, and what is only
        partly prefilled begins again. recompute: so does everything that runs."""
        self.prefixes.clear()
        self._leaders.clear()
        for followers in self._followers.values():
            self.waiting.extendleft(reversed(followers))
        self._followers.clear()
        begun = self.slots.occupants[self.slots.decoding :]
        if recompute:
            begun = list(self.slots.occupants)
        for sequence in reversed(begun):
            self.take_out(sequence)
            self.waiting.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of its slot, or out of the queue."""
        if sequence.slot >= 0:
            self.take_out(sequence)
            return
        followers = self._followers.get(sequence.key, [])
        if sequence in followers:
            followers.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _admit(self) -> None:
        copies: list[tuple[Sequence, int]] = []  # leader and the slot of its follower
        while (sequence := self._next()) is not None:
            if not self._has_room_for(sequence):
                break
            self.waiting.popleft()
            # What has generated already shares its prompt with nobody: its own tokens follow.
            leader = None if sequence.generated else self._leaders.get(sequence.key)
            if leader is not None and not leader.prefilled:
                self._followers.setdefault(sequence.key, []).append(sequence)
                continue
            if leader is not None:
                # The last prompt token is computed anew: its hidden state gives the first token's distribution.
                sequence.cached = len(sequence.tokens) - 1
                copies.append((leader, self.slots.occupy(sequence, self.default_stops)))
                continue
            sequence.cached = self.prefixes.load(sequence.tokens, self.slots.used)
            self.slots.occupy(sequence, self.default_stops)
            if not sequence.generated:
                self._leaders[sequence.key] = sequence
        self._copy(copies)

    def _copy(self, copies: list[tuple[Sequence, int]]) -> None:
        """Copy leaders' prompts; neighbouring slots with one leader at once."""
        start = 0
        while start < len(copies):
            leader, first = copies[start]
            end = start
            while end < len(copies) and copies[end][0] is leader and copies[end][1] == first + end - start:
                end += 1
            self.cache.copy(leader.slot, first, end - start, len(leader.request.prompt) - 1)
            start = end

    def _has_room_for(self, sequence: Sequence) -> bool:
        """Whether a slot can be had for ``sequence``, changing the shape of the cache where that helps."""
        cache, used = self.cache, self.slots.used
        if used >= self.slots.count:
            return False
        longest = max(int(self.slots.length[:used].max(initial=0)), self._longest_prefill())
        needed = max(longest, len(sequence.tokens)) + 1
        positions = round_positions(needed)
        if used + 1 > cache.slots_at(max(positions, cache.positions)) and cache.positions > 2 * positions:
            # Narrower slots, and more of them; not the narrowest, or the next token would widen them again.
            positions = 2 * positions
        elif positions <= cache.positions:
            positions = cache.positions
        if used + 1 > cache.slots_at(positions):
            return False
        cache.resize(positions, used)
        return True

    def _longest_prefill(self) -> int:
        return max((len(s.tokens) for s in self.slots.occupants[self.slots.decoding :]), default=0)

    def _make_room(self, positions: int) -> None:
        """Widen the slots for ``positions``, at the cost of those that came last where need be."""
        if positions <= self.cache.positions:
            return
        allowed = self.cache.slots_at(positions)
        while self.slots.used > allowed:
            # Requests are numbered in the order in which they came.
            victim = max(self.slots.occupants, key=lambda s: (s.request.id, s.index))
            self.take_out(victim)
            self.waiting.appendleft(victim)
            self.preemptions += 1
        self.cache.resize(positions, self.slots.used)


def tokens_in_cache(slots: Slots) -> int:
    """Positions in use, of all running sequences together."""
    return int(np.sum(slots.length[: slots.used]))
