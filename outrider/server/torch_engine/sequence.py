"""A request inside the engine, and the sequences it consists of."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from outrider.contract.generation import ChoiceLogprobs, CompletionChoice, FinishReason, SamplingParams, VersionSpan
from outrider.server.torch_engine.randomness import stream_seed


@dataclass(eq=False)
class Sequence:
    """One completion being made. Token data of a running sequence live in its slot, see ``slots``.

    cached: tokens of the prompt whose keys and values are in the cache. boundaries: ``(version, index)``, the
    version in force from the index-th generated token on.
    """

    request: "Request"
    index: int
    prompt: np.ndarray  # int64 [prompt tokens]
    key: bytes
    seed: int
    slot: int = -1
    cached: int = 0
    boundaries: list[tuple[int, int]] = field(default_factory=list)

    @property
    def prefilled(self) -> bool:
        return self.cached == len(self.prompt)

    @property
    def remaining(self) -> int:
        """Prompt tokens still to be prefilled."""
        return len(self.prompt) - self.cached

    def version_spans(self, tokens: int) -> list[VersionSpan]:
        """Versions of the first ``tokens`` generated tokens."""
        starts = [index for _, index in self.boundaries] + [tokens]
        spans = [(version, min(starts[i + 1], tokens) - start) for i, (version, start) in enumerate(self.boundaries)]
        return [(version, count) for version, count in spans if count > 0]


class Request:
    """One prompt of which ``n`` completions are wanted; ``on_done`` is called once, on the engine's thread."""

    def __init__(
        self,
        request_id: str,
        prompt: list[int],
        sampling: SamplingParams,
        n: int,
        seed: int,
        on_done: Callable[["Request"], None],
    ) -> None:
        self.request_id = request_id
        self.sampling = sampling
        self.on_done = on_done
        self.choices: list[CompletionChoice | None] = [None] * n
        self.failure: str | None = None  # why the choices are no good
        self.unfinished = n
        ids = np.asarray(prompt, dtype=np.int64)
        key = ids.tobytes()
        self.sequences = [Sequence(self, i, ids, key, stream_seed(seed, i)) for i in range(n)]

    def finish(
        self, sequence: Sequence, tokens: list[int], logprobs: list[float], reason: FinishReason, text: str
    ) -> None:
        """Record the end of one sequence; call ``on_done`` with the last."""
        if self.choices[sequence.index] is not None:
            return
        self.choices[sequence.index] = CompletionChoice(
            index=sequence.index,
            text=text,
            finish_reason=reason,
            token_ids=tokens,
            logprobs=ChoiceLogprobs(token_logprobs=logprobs),
            weight_versions=sequence.version_spans(len(tokens)),
        )
        self.unfinished -= 1
        if self.unfinished == 0:
            self.on_done(self)
