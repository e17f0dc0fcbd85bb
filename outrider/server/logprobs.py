"""The log-probabilities of a piece, token by token, in the shapes of the two kinds of answer."""

from outrider.contract.arrays import unpack_floats, unpack_ints
from outrider.contract.chat import ChatLogprobs, TokenLogprob, TopLogprob
from outrider.contract.generation import ChoiceLogprobs
from outrider.server.pieces import Piece
from outrider.server.text import TextCodec

#: What stands for minus infinity, which JSON does not know; OpenAI's API writes it for tokens that cannot be drawn.
IMPOSSIBLE = -9999.0


def completion_logprobs(piece: Piece, alternatives: int, codec: TextCodec) -> ChoiceLogprobs:
    """Those of ``/v1/completions``. With alternatives, the sampled token is always among them."""
    sampled = unpack_floats(piece.logprobs).tolist()
    if not alternatives:
        return ChoiceLogprobs(token_logprobs=sampled)
    tokens = [codec.token(token).text for token in unpack_ints(piece.token_ids).tolist()]
    top: list[dict[str, float]] = []
    for token, logprob, likely in zip(tokens, sampled, _alternatives(piece, alternatives), strict=True):
        listed: dict[str, float] = {}
        for other, other_logprob in likely:
            # Several tokens may have one text, such as halves of characters: the most likely one is listed.
            listed.setdefault(codec.token(other).text, other_logprob)
        listed.setdefault(token, logprob)
        top.append(listed)
    return ChoiceLogprobs(token_logprobs=sampled, tokens=tokens, top_logprobs=top, text_offset=piece.offsets)


def chat_logprobs(piece: Piece, alternatives: int, codec: TextCodec) -> ChatLogprobs:
    """Those of ``/v1/chat/completions``."""
    sampled = zip(unpack_ints(piece.token_ids).tolist(), unpack_floats(piece.logprobs).tolist(), strict=True)
    content = []
    for (token, logprob), likely in zip(sampled, _alternatives(piece, alternatives), strict=True):
        said = codec.token(token)
        top = [_top(codec, other, other_logprob) for other, other_logprob in likely]
        content.append(TokenLogprob(token=said.text, bytes=said.bytes, logprob=logprob, top_logprobs=top))
    return ChatLogprobs(content=content)


def _top(codec: TextCodec, token: int, logprob: float) -> TopLogprob:
    said = codec.token(token)
    return TopLogprob(token=said.text, bytes=said.bytes, logprob=logprob)


def _alternatives(piece: Piece, count: int) -> list[list[tuple[int, float]]]:
    """For each token the most likely ones in its place."""
    if not count:
        return [[] for _ in range(piece.tokens)]
    ids = unpack_ints(piece.top_ids).reshape(-1, count).tolist()
    logprobs = unpack_floats(piece.top_logprobs).clip(min=IMPOSSIBLE).reshape(-1, count).tolist()
    return [list(zip(*row, strict=True)) for row in zip(ids, logprobs, strict=True)]
