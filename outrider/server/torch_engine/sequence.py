"""A request inside a replica, and the sequences it consists of."""

from dataclasses import dataclass, field

import numpy as np

from outrider.contract.arrays import unpack_floats, unpack_ints
from outrider.contract.generation import VersionSpan
from outrider.contract.sampling import SamplingParams
from outrider.server.torch_engine.messages import Submit
from outrider.server.torch_engine.randomness import stream_seed


@dataclass(eq=False)
class Sequence:
    """One completion being made. What it has generated lies in its slot (see ``slots``) while it has one, and in
    ``tokens`` and ``logprobs`` while it has none.

    tokens: int64, the prompt and what was generated up to when it got its slot. key: names the prompt. seed: of its
    stream of random numbers. slot: -1 without one. cached: how many of ``tokens`` are in the cache. boundaries:
    ``(version, index)``, the version in force from the index-th generated token on. sent: generated tokens that have
    been reported. alternatives: for each unreported token, most likely tokens and their log-probabilities.
    """

    request: "Request"
    index: int
    tokens: np.ndarray
    logprobs: np.ndarray  # float32, of the generated part
    key: bytes
    seed: int
    slot: int = -1
    cached: int = 0
    ended: bool = False
    boundaries: list[tuple[int, int]] = field(default_factory=list)
    sent: int = 0
    alternatives: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    @property
    def generated(self) -> int:
        """Tokens generated when it got its slot."""
        return len(self.logprobs)

    @property
    def prefilled(self) -> bool:
        return self.cached == len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens still to be prefilled."""
        return len(self.tokens) - self.cached

    def note_version(self, version: int, index: int) -> None:
        """From the ``index``-th generated token on, ``version`` samples."""
        if self.boundaries and self.boundaries[-1][1] == index:
            self.boundaries.pop()
        if not self.boundaries or self.boundaries[-1][0] != version:
            self.boundaries.append((version, index))

    def version_spans(self, first: int, end: int) -> list[VersionSpan]:
        """Versions of the generated tokens ``first`` to ``end`` - 1."""
        if not self.boundaries:  # it has not begun
            return []
        ends = [index for _, index in self.boundaries[1:]] + [end]
        spans = [
            (version, min(stop, end) - max(start, first))
            for (version, start), stop in zip(self.boundaries, ends, strict=True)
        ]
        return [(version, count) for version, count in spans if count > 0]


class Request:
    """One prompt of which ``n`` completions are wanted."""

    def __init__(self, submit: Submit) -> None:
        self.id = submit.request
        self.sampling: SamplingParams = submit.sampling
        self.stream = submit.stream
        prompt = unpack_ints(submit.prompt).astype(np.int64)
        self.prompt = prompt
        key = prompt.tobytes()
        none = np.zeros(0, dtype=np.float32)
        self.sequences = [
            Sequence(self, index, prompt, none, key, stream_seed(submit.seed, index)) for index in range(submit.n)
        ]
        for sequence, progress in zip(self.sequences, submit.progress, strict=False):
            self._go_on(sequence, unpack_ints(progress.token_ids), progress.logprobs, progress.versions)
            sequence.ended = progress.ended

    def _go_on(self, sequence: Sequence, tokens: np.ndarray, logprobs: bytes, versions: list[VersionSpan]) -> None:
        sequence.tokens = np.concatenate([self.prompt, tokens.astype(np.int64)])
        sequence.logprobs = unpack_floats(logprobs).copy()
        sequence.sent = len(tokens)
        place = 0
        for version, count in versions:
            sequence.boundaries.append((version, place))
            place += count

    @property
    def finished(self) -> bool:
        return all(sequence.ended for sequence in self.sequences)
