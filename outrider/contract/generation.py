"""The data plane: ``/v1/completions`` in the fields of OpenAI's and vLLM's API that an engine here answers.

A field that this contract does not list is refused by the server, never ignored.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from outrider.contract.arrays import FloatArray, IntArray
from outrider.contract.sampling import (
    MAX_ALTERNATIVES,
    AdditivePenalty,
    Bias,
    MinP,
    RepetitionPenalty,
    SamplingParams,
    Seed,
    Temperature,
    TopK,
    TopP,
)

FinishReason = Literal["stop", "length", "abort"]

#: ``(version, count)``: the next ``count`` tokens were sampled with the weights of ``version``.
VersionSpan = tuple[int, int]

#: Media type of a :class:`PackedCompletion`. A client that accepts it gets it instead of JSON, where the server can.
PACKED_MEDIA_TYPE = "application/vnd.outrider.completion+msgpack"

Stop = Annotated[str, Meta(min_length=1, max_length=4096)]


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """include_usage: end the stream with a chunk that has no choices but the token counts."""

    include_usage: bool = False


class SamplingFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Fields that both kinds of request share. See :class:`SamplingParams` for what an engine makes of them.

    n: completions wanted of the one prompt; choice ``i`` of a seeded request draws from a stream of its own, which
    depends on the seed and on ``i`` alone: asking for more choices, or beside other requests, does not change it.
    stop: texts that end a completion and are cut off, unless include_stop_str_in_output. return_token_ids: put token
    ids and versions into the choices. request_id: the ``id`` of the answer. user: accepted, and not used.
    """

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=1024)] = 1
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = -1
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: AdditivePenalty = 0.0
    frequency_penalty: AdditivePenalty = 0.0
    logit_bias: dict[str, Bias] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=16)] | None = None
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    request_id: str | None = None
    user: str | None = None

    def stops(self) -> list[str]:
        """The stop texts as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class CompletionRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Body of ``POST /v1/completions``.

    prompt: text or token ids. logprobs: 0 for the log-probability of each sampled token, k for the k most likely
    tokens besides, null for none.
    """

    prompt: str | list[int]
    max_tokens: Annotated[int, Meta(ge=1)] | None = 16
    logprobs: Annotated[int, Meta(ge=0, le=MAX_ALTERNATIVES)] | None = None
    echo: Literal[False] = False
    best_of: Literal[1] | None = None


class ChoiceLogprobs(msgspec.Struct, kw_only=True, omit_defaults=True):
    """``token_logprobs[t]``: log-probability (nats) of token t under the distribution it was drawn from, that is after
    penalties, temperature and truncation. top_logprobs: the most likely tokens' texts and log-probabilities.
    text_offset: where each token's text begins."""

    token_logprobs: list[float]
    tokens: list[str] | None = None
    top_logprobs: list[dict[str, float]] | None = None
    text_offset: list[int] | None = None


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One completion, or in a stream what has been added to it. ``weight_versions`` run-length encodes the version of
    every token in ``token_ids``. stop_reason: the stop text that ended it."""

    index: int
    text: str
    finish_reason: FinishReason | None
    stop_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: ChoiceLogprobs | None = None
    weight_versions: list[VersionSpan] | None = None


class Usage(msgspec.Struct, kw_only=True):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(msgspec.Struct, kw_only=True):
    """Answer of ``POST /v1/completions``, and one chunk of it in a stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    object: Literal["text_completion"] = "text_completion"


class PackedChoice(msgspec.Struct, kw_only=True):
    """A :class:`CompletionChoice` with one entry a token in ``token_ids`` (int32) and ``logprobs`` (float32)."""

    index: int
    text: str
    finish_reason: FinishReason
    token_ids: IntArray
    logprobs: FloatArray
    weight_versions: list[VersionSpan]


class PackedCompletion(msgspec.Struct, kw_only=True):
    """Answer of ``POST /v1/completions`` to a client that accepts ``PACKED_MEDIA_TYPE``, in MessagePack: JSON of a
    thousand log-probabilities costs either side a hundred times as much."""

    id: str
    choices: list[PackedChoice]
    usage: Usage


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


def sampling_params(body: SamplingFields, max_tokens: int, alternatives: int) -> SamplingParams:
    """The engine's part of a request. Raises ValueError for a ``logit_bias`` whose key is no token id."""
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items()),
        stop_token_ids=body.stop_token_ids,
        ignore_eos=body.ignore_eos,
        seed=body.seed,
        alternatives=alternatives,
    )


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
