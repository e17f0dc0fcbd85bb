"""What every engine offers to the HTTP application: tokens in, tokens out, and a change of weights.

Texts are not an engine's business: the application encodes prompts, decodes completions and finds stop texts.
"""

from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

from outrider.contract.arrays import FloatArray, IntArray
from outrider.contract.control import Inflight, ServerInfo, WeightStatus
from outrider.contract.generation import FinishReason, VersionSpan
from outrider.contract.manifest import Manifest
from outrider.contract.sampling import SamplingParams


class InvalidRequest(Exception):
    """The request cannot be served as it is; answered with status 400. ``param`` names the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Conflict(Exception):
    """The request does not fit the state of the server; answered with status 409."""


class Unavailable(Exception):
    """The server takes no requests, now or any more; answered with status 503."""


class ChoiceDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Tokens added to one choice of a request: a whole completion, or one step's part of it in a stream.

    token_ids, logprobs: one entry a token. versions: run-length. top_ids, top_logprobs: ``alternatives`` entries a
    token, most likely first; empty when none were asked for. finish_reason: set in the last delta of a choice.
    """

    index: int
    token_ids: IntArray = b""
    logprobs: FloatArray = b""
    versions: list[VersionSpan] = []
    top_ids: IntArray = b""
    top_logprobs: FloatArray = b""
    finish_reason: FinishReason | None = None


class Generation(Protocol):
    """A request being answered. Iterating it gives the deltas of its choices as they come, until every choice has its
    last one; it raises Unavailable when the request cannot be finished."""

    def __aiter__(self) -> AsyncIterator[ChoiceDelta]: ...

    def end_choice(self, index: int) -> None:
        """Choice ``index`` is long enough (its stop text has come): it is sampled no further, and gives no more
        deltas, not even a last one."""
        ...

    def close(self) -> None:
        """Nobody reads any more: stop whatever still runs. Does nothing when all is done; safe to call twice."""
        ...


class EngineLoad(msgspec.Struct, kw_only=True):
    """A glance at an engine. Counters since its start.

    running, waiting: sequences that are decoded or prefilled, and that wait. cache_usage: share of the cache in use.
    prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache, and found there. preemptions: sequences
    put back for lack of cache. restarts: replicas started anew after they died. idle_seconds: without any sequence,
    mean over the replicas.
    """

    running: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    steps: int = 0
    cache_usage: float = 0.0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    restarts: int = 0
    idle_seconds: float = 0.0


class Engine(Protocol):
    """Answers requests and changes its weights. Everything is called on the server's event loop."""

    async def start(self) -> None:
        """Get ready to answer. Raises UserError for what the user can mend."""
        ...

    def info(self) -> ServerInfo:
        """Who this engine is and which version it serves."""
        ...

    def load(self) -> EngineLoad:
        """What it is doing now."""
        ...

    def check(self, prompt: list[int], sampling: SamplingParams) -> None:
        """Raises InvalidRequest for what this engine cannot serve, naming field and allowed range."""
        ...

    def generate(
        self, prompt: list[int], sampling: SamplingParams, n: int, request_id: str, stream: bool
    ) -> Generation:
        """Start ``n`` completions of ``prompt``. stream: deltas with every step; otherwise one delta a choice.

        Raises InvalidRequest as :meth:`check` does, Unavailable when the engine has failed.
        """
        ...

    async def stage(self, manifest: Manifest) -> WeightStatus:
        """Fetch and verify a version beside the weights in use. Raises Conflict when it is refused."""
        ...

    async def commit(self, run_id: str, version: int, inflight: Inflight) -> WeightStatus:
        """Switch to the staged version between two steps. Raises Conflict when it is not what is staged."""
        ...

    def status(self) -> WeightStatus:
        """The state of the weights."""
        ...

    async def drain(self, timeout: float) -> None:
        """Let running requests end for ``timeout`` seconds, then end the rest with ``finish_reason`` "abort"."""
        ...

    def failure(self) -> str | None:
        """Why the engine has stopped working, or None while it works."""
        ...

    async def close(self) -> None:
        """Stop the engine's processes."""
        ...
