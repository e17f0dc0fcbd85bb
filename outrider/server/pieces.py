"""From what an engine gives to what a client reads: the text and the tokens of choices, piece by piece."""

from collections.abc import Iterable
from itertools import chain

import msgspec

from outrider.contract.arrays import FloatArray, IntArray, unpack_ints
from outrider.contract.generation import FinishReason, SamplingFields, VersionSpan, append_version
from outrider.server.engine import ChoiceDelta
from outrider.server.stops import StopSearch, StopTexts
from outrider.server.text import TextCodec

#: Bytes of one token id, and of one log-probability.
_WIDTH = 4


class Piece(msgspec.Struct, kw_only=True):
    """What is added to a choice, or all of it. Arrays as in ``ChoiceDelta``.

    offsets: characters of text before each token; kept by :class:`PieceWriter` only. finish_reason: set in the last.
    """

    index: int
    text: str
    token_ids: IntArray
    logprobs: FloatArray
    versions: list[VersionSpan]
    top_ids: IntArray
    top_logprobs: FloatArray
    offsets: list[int] = []
    finish_reason: FinishReason | None
    stop_reason: str | None = None

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return len(self.token_ids) // _WIDTH


class WholeWriter:
    """Pieces that are whole choices, which end as the engine says: nothing is done token by token."""

    def __init__(self, codec: TextCodec, body: SamplingFields) -> None:
        self.codec, self.skip_special = codec, body.skip_special_tokens

    def write(self, delta: ChoiceDelta) -> Piece:
        """The choice."""
        text = self.codec.decode(unpack_ints(delta.token_ids).tolist(), self.skip_special)
        return _piece(delta, text, [], delta.finish_reason)


class PieceWriter:
    """Pieces of one choice, token by token: its text as far as it is certain, up to a stop text."""

    def __init__(self, codec: TextCodec, body: SamplingFields, stops: StopTexts) -> None:
        self.detokenizer = codec.detokenizer(body.skip_special_tokens)
        self.search = StopSearch(stops, body.include_stop_str_in_output)
        self.min_tokens = body.min_tokens
        self._tokens = self._characters = 0

    def write(self, delta: ChoiceDelta) -> Piece:
        """What ``delta`` adds. Tokens behind the one that completes a stop text are left out, and the piece is the
        last one, with finish_reason "stop"."""
        texts: list[str] = []
        offsets: list[int] = []
        for token in unpack_ints(delta.token_ids).tolist():
            offsets.append(self._characters)
            self._tokens += 1
            texts.append(self._push(self.detokenizer.push(token)))
            if self.search.found:
                break
        if delta.finish_reason and not self.search.found:
            texts.append(self._push(self.detokenizer.rest()))
            if not self.search.found:
                texts.append(self.search.rest())
        finish_reason = "stop" if self.search.found else delta.finish_reason
        piece = _piece(delta, "".join(texts), offsets, finish_reason)
        piece.stop_reason = self.search.found
        return piece if len(offsets) * _WIDTH == len(delta.token_ids) else _cut(piece, len(offsets))

    def _push(self, text: str) -> str:
        self._characters += len(text)
        return self.search.push(text, self._tokens >= self.min_tokens)


def join(pieces: list[Piece]) -> Piece:
    """The whole choice that ``pieces``, one at least, are the parts of."""
    versions: list[VersionSpan] = []
    for version, count in chain.from_iterable(piece.versions for piece in pieces):
        append_version(versions, version, count)
    return Piece(
        index=pieces[0].index,
        text="".join(piece.text for piece in pieces),
        token_ids=b"".join(piece.token_ids for piece in pieces),
        logprobs=b"".join(piece.logprobs for piece in pieces),
        versions=versions,
        top_ids=b"".join(piece.top_ids for piece in pieces),
        top_logprobs=b"".join(piece.top_logprobs for piece in pieces),
        offsets=list(chain.from_iterable(piece.offsets for piece in pieces)),
        finish_reason=pieces[-1].finish_reason,
        stop_reason=pieces[-1].stop_reason,
    )


def _piece(delta: ChoiceDelta, text: str, offsets: list[int], finish_reason: FinishReason | None) -> Piece:
    return Piece(
        index=delta.index,
        text=text,
        token_ids=delta.token_ids,
        logprobs=delta.logprobs,
        versions=delta.versions,
        top_ids=delta.top_ids,
        top_logprobs=delta.top_logprobs,
        offsets=offsets,
        finish_reason=finish_reason,
    )


def _cut(piece: Piece, tokens: int) -> Piece:
    """The piece less what is behind its first ``tokens``, one at least."""
    alternatives = len(piece.top_ids) // len(piece.token_ids)
    piece.versions = _first(piece.versions, tokens)
    piece.token_ids, piece.logprobs = piece.token_ids[: tokens * _WIDTH], piece.logprobs[: tokens * _WIDTH]
    piece.top_ids = piece.top_ids[: tokens * alternatives * _WIDTH]
    piece.top_logprobs = piece.top_logprobs[: tokens * alternatives * _WIDTH]
    return piece


def _first(spans: Iterable[VersionSpan], tokens: int) -> list[VersionSpan]:
    """The spans of the first ``tokens``."""
    first: list[VersionSpan] = []
    for version, count in spans:
        append_version(first, version, min(count, tokens - sum(taken for _, taken in first)))
    return first
