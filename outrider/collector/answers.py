"""What a server answers to a completion request, packed or in JSON, and what rollouts are made of."""

from collections.abc import Sequence

import msgspec

from outrider.contract.generation import (
    PACKED_MEDIA_TYPE,
    FinishReason,
    PackedCompletion,
    VersionSpan,
    version_spans_total,
)
from outrider.environments.base import Completion, logprob_array, token_array

#: What a client says it takes. A server that cannot pack, such as a stock one, answers JSON.
ACCEPT = f"{PACKED_MEDIA_TYPE}, application/json"


class BadAnswer(Exception):
    """A server answered with completions of which no rollouts can be made."""


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float] = []


class _Choice(msgspec.Struct):
    """The part of a choice that is needed here: servers may add fields, and fill others with what they like."""

    text: str
    finish_reason: FinishReason
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    weight_versions: list[VersionSpan] | None = None


class _Response(msgspec.Struct):
    choices: list[_Choice]


_decode_packed = msgspec.msgpack.Decoder(PackedCompletion).decode
_decode_json = msgspec.json.Decoder(_Response).decode


def read_answer(body: bytes, content_type: str, server: str, version: int | None = None) -> list[Completion]:
    """The completions of an answer. server: its URL. version: of all tokens, where the server does not say it. Raises
    BadAnswer, and MsgspecError for what is no answer."""
    if content_type.startswith(PACKED_MEDIA_TYPE):
        return [
            _completion(c.token_ids, c.logprobs, c.weight_versions, c.text, c.finish_reason, server)
            for c in _decode_packed(body).choices
        ]
    completions = []
    for choice in _decode_json(body).choices:
        tokens, versions = choice.token_ids, choice.weight_versions
        if version is not None:
            tokens = tokens or []
            versions = [(version, len(tokens))] if tokens else []
        # Of a choice that was ended before its first token there are none.
        logprobs = choice.logprobs.token_logprobs if choice.logprobs else None if tokens else []
        if tokens is None or logprobs is None or versions is None:
            raise BadAnswer(f"{server} left out token ids, log-probabilities or versions")
        completions.append(_completion(tokens, logprobs, versions, choice.text, choice.finish_reason, server))
    return completions


def _completion(
    tokens: bytes | Sequence[int],
    logprobs: bytes | Sequence[float],
    versions: list[VersionSpan],
    text: str,
    reason: FinishReason,
    server: str,
) -> Completion:
    try:
        completion = Completion(token_array(tokens), logprob_array(logprobs), versions, text, reason, server)
    except (ValueError, OverflowError) as error:
        raise BadAnswer(f"{server} sent token ids or log-probabilities of a wrong kind: {error}") from error
    counts = len(completion.tokens), len(completion.logprobs), version_spans_total(versions)
    if not counts[0] == counts[1] == counts[2]:
        raise BadAnswer("{} sent {} tokens with {} log-probabilities and {} versions".format(server, *counts))
    return completion
