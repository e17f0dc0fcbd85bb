"""The interface between an environment and whatever samples for it."""

from dataclasses import dataclass, field
from typing import Protocol

from outrider.contract.generation import FinishReason, VersionSpan


@dataclass
class Completion:
    """What a server sampled after a prompt. tokens, logprobs: one entry a token; versions: run-length, see contract."""

    tokens: list[int]
    logprobs: list[float]
    versions: list[VersionSpan]
    text: str
    finish_reason: FinishReason
    server: str


@dataclass
class Rollout:
    """One rollout. ``tokens`` follow the prompt; ``mask`` is 1 where the policy sampled (None: everywhere)."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    versions: list[VersionSpan]
    text: str
    finish_reason: FinishReason
    server: str
    mask: list[int] | None = None
    info: dict[str, object] = field(default_factory=dict)


class Sample(Protocol):
    """Samples ``n`` completions of token ids; the streams of random numbers derive from ``seed``."""

    async def __call__(self, prompt: list[int], n: int, seed: int) -> list[Completion]: ...


class Environment(Protocol):
    """Makes the rollouts of a group."""

    async def rollouts(self, prompt: list[int], count: int, seed: int, sample: Sample) -> list[Rollout]:
        """``count`` rollouts of one prompt."""
        ...
