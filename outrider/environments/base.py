"""The interface between an environment and whatever samples for it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from outrider.contract.arrays import FloatArray, IntArray
from outrider.contract.generation import FinishReason, VersionSpan


def token_array(data: IntArray | Sequence[int] = b"") -> array[int]:
    """Token ids as they travel here, of raw bytes or of integers: 4 bytes a token, and used like a list of int (``+``
    and ``+=`` join, ``==`` compares, elements are plain integers). Raises ValueError for bytes that are no int32."""
    return array("i", data)


def logprob_array(data: FloatArray | Sequence[float] = b"") -> array[float]:
    """Log-probabilities as they travel here, float32. Raises ValueError for bytes that are no float32."""
    return array("f", data)


@dataclass
class Completion:
    """What a server sampled after a prompt. tokens, logprobs: one entry a token; versions: run-length, see contract."""

    tokens: array[int]
    logprobs: array[float]
    versions: list[VersionSpan]
    text: str
    finish_reason: FinishReason
    server: str


@dataclass
class Rollout:
    """One rollout. ``tokens`` follow the prompt; ``mask`` is 1 where the policy sampled (None: everywhere).

    An environment may give tokens and log-probabilities as :class:`Completion` has them, or as lists.
    """

    prompt: Sequence[int]
    tokens: Sequence[int]
    logprobs: Sequence[float]
    versions: list[VersionSpan]
    text: str
    finish_reason: FinishReason
    server: str
    mask: Sequence[int] | None = None
    info: dict[str, object] = field(default_factory=dict)


class Sample(Protocol):
    """Samples ``n`` completions of token ids; the streams of random numbers derive from ``seed``."""

    async def __call__(self, prompt: Sequence[int], n: int, seed: int) -> list[Completion]: ...


class Environment(Protocol):
    """Makes the rollouts of a group."""

    async def rollouts(self, prompt: Sequence[int], count: int, seed: int, sample: Sample) -> list[Rollout]:
        """``count`` rollouts of one prompt."""
        ...
