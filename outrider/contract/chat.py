"""The data plane: ``/v1/chat/completions``. Messages are rendered by the model's own template and sampled as text."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from outrider.contract.generation import FinishReason, SamplingFields, Usage, VersionSpan
from outrider.contract.sampling import MAX_ALTERNATIVES


class ChatRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Body of ``POST /v1/chat/completions``.

    messages, tools and chat_template_kwargs go to the model's template as they are. max_tokens (or its newer name
    max_completion_tokens): null for what the context holds. logprobs: of each sampled token; top_logprobs: of the
    most likely ones besides.
    """

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_ALTERNATIVES)] | None = None


class TopLogprob(msgspec.Struct, kw_only=True):
    """A token's text, its UTF-8 bytes and its log-probability."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob, kw_only=True):
    """The same of a sampled token, with the most likely ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    """One entry a token."""

    content: list[TokenLogprob]


class ChatMessage(msgspec.Struct, kw_only=True):
    """What the model said."""

    content: str
    role: Literal["assistant"] = "assistant"


class ChatChoice(msgspec.Struct, kw_only=True):
    """One completion of a conversation; the fields at the end as in ``CompletionChoice``."""

    index: int
    message: ChatMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None
    stop_reason: str | None = None
    token_ids: list[int] | None = None
    weight_versions: list[VersionSpan] | None = None


class ChatResponse(msgspec.Struct, kw_only=True):
    """Answer of ``POST /v1/chat/completions``."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class ChatDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What has been added to a message; the role stands in the first chunk only."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """One choice of a chunk."""

    index: int
    delta: ChatDelta
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None = None
    stop_reason: str | None = None
    token_ids: list[int] | None = None
    weight_versions: list[VersionSpan] | None = None


class ChatChunk(msgspec.Struct, kw_only=True):
    """One chunk of a streamed answer."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
