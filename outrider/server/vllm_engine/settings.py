"""What the launcher tells the server process, in one environment variable, and how that answers when it cannot start.
Imports no torch and no vLLM."""

import os
from typing import Literal

import msgspec

from outrider.server.config import RolloutConfig

VARIABLE = "OUTRIDER_VLLM"
#: Stands before the reason, in the log of a server process that will not start: no exception gets through uvicorn.
CANNOT_START = "it cannot start: "

Staging = Literal["device", "host"]


class VllmSettings(msgspec.Struct, kw_only=True):
    """config: of the command line, its key left out. directory: for orders and reports of the workers. engines:
    data-parallel ones; workers: of all of them together. engine_seqs: sequences decoded at once by one engine.
    staging: where the second set of weights lies. hot: temperatures above vLLM's own limit are served."""

    config: RolloutConfig
    directory: str
    engines: int
    workers: int
    engine_seqs: int
    staging: Staging
    hot: bool

    def environment(self) -> dict[str, str]:
        """As a variable for a child."""
        return {VARIABLE: msgspec.json.encode(self).decode()}


def settings_from_environment() -> VllmSettings:
    """What the launcher has told."""
    text = os.environ.get(VARIABLE)
    if not text:
        raise RuntimeError(f"{VARIABLE} is not set: this middleware is for servers that `outrider rollout` starts")
    return msgspec.json.decode(text, type=VllmSettings)
