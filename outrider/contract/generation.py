"""The data plane: ``/v1/completions``, the fields of OpenAI's and vLLM's API that an engine here answers.

A field that this contract does not list is refused by the server, never ignored.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

FinishReason = Literal["stop", "length", "abort"]

#: ``(version, count)``: the next ``count`` tokens were sampled with the weights of ``version``.
VersionSpan = tuple[int, int]


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True):
    """How tokens are chosen. ``temperature`` 0 is greedy; ``top_p`` 1 and ``top_k`` 0 or -1 are off."""

    max_tokens: Annotated[int, Meta(ge=1)] = 16
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = -1
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    stop_token_ids: tuple[int, ...] = ()


class CompletionRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Body of ``POST /v1/completions``.

    prompt: text or token ids. n: completions wanted of the one prompt; choice ``i`` of a seeded request draws from
    a stream of its own, which depends on the seed and on ``i`` alone: asking for more choices, or beside other
    requests, does not change it. logprobs: 0 for the log-probability of each sampled token, null for none.
    return_token_ids: put the token ids and versions into the choices. request_id: the ``id`` of the answer.
    """

    prompt: str | list[int]
    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=1)] = 16
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = -1
    n: Annotated[int, Meta(ge=1, le=1024)] = 1
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    stop_token_ids: tuple[int, ...] = ()
    logprobs: Annotated[int, Meta(ge=0, le=0)] | None = None
    return_token_ids: bool = False
    stream: Literal[False] = False
    request_id: str | None = None
    user: str | None = None

    def sampling(self) -> SamplingParams:
        """The sampling part of the request."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop_token_ids=self.stop_token_ids,
        )


class ChoiceLogprobs(msgspec.Struct, kw_only=True):
    """``token_logprobs[t]``: log-probability (nats) of token t under the distribution it was drawn from,
    that is after temperature and after top-p/top-k truncation."""

    token_logprobs: list[float]
    tokens: list[str] | None = None


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One completion. ``weight_versions`` run-length encodes the version of every token in ``token_ids``."""

    index: int
    text: str
    finish_reason: FinishReason
    token_ids: list[int] | None = None
    logprobs: ChoiceLogprobs | None = None
    weight_versions: list[VersionSpan] | None = None


class Usage(msgspec.Struct, kw_only=True):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(msgspec.Struct, kw_only=True):
    """Answer of ``POST /v1/completions``."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    object: Literal["text_completion"] = "text_completion"


class ModelCard(msgspec.Struct, kw_only=True):
    """One served model, as OpenAI and vLLM list it."""

    id: str
    max_model_len: int
    created: int = 0
    owned_by: str = "outrider"
    object: Literal["model"] = "model"


class ModelList(msgspec.Struct, kw_only=True):
    """Answer of ``GET /v1/models``."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


def version_spans_total(spans: list[VersionSpan]) -> int:
    """Number of tokens that ``spans`` describe."""
    return sum(count for _, count in spans)


def append_version(spans: list[VersionSpan], version: int, count: int = 1) -> None:
    """Extend ``spans`` in place by ``count`` tokens of ``version``."""
    if count <= 0:
        return
    if spans and spans[-1][0] == version:
        spans[-1] = (version, spans[-1][1] + count)
    else:
        spans.append((version, count))
