"""What every engine offers to the HTTP application: one interface, whatever computes the tokens."""

from typing import Protocol

import msgspec

from outrider.contract.control import ServerInfo, WeightStatus
from outrider.contract.generation import CompletionChoice, SamplingParams
from outrider.contract.manifest import Manifest


class InvalidRequest(Exception):
    """The request cannot be served as it is; answered with status 400. ``param`` names the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Conflict(Exception):
    """The request does not fit the state of the server; answered with status 409."""


class Unavailable(Exception):
    """The server takes no requests, now or any more; answered with status 503."""


class EngineLoad(msgspec.Struct, kw_only=True):
    """A glance at an engine. Counters since its start."""

    running: int
    waiting: int
    prompt_tokens: int
    generated_tokens: int
    requests: int
    steps: int
    cache_usage: float


class Engine(Protocol):
    """Answers requests and changes its weights. Every coroutine runs on the server's event loop."""

    def info(self) -> ServerInfo:
        """Who this engine is and which version it serves."""
        ...

    def load(self) -> EngineLoad:
        """What it is doing now."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text prompt."""
        ...

    async def generate(
        self, prompt: list[int], sampling: SamplingParams, n: int, request_id: str
    ) -> list[CompletionChoice]:
        """``n`` completions of ``prompt``. Cancelling the awaiting task aborts the request.

        Raises InvalidRequest for what this engine cannot serve, Unavailable when it has failed.
        """
        ...

    async def stage(self, manifest: Manifest) -> WeightStatus:
        """Fetch and verify a version beside the weights in use. Raises Conflict when it is refused."""
        ...

    async def commit(self, run_id: str, version: int) -> WeightStatus:
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

    def close(self) -> None:
        """Stop the engine's threads."""
        ...
