"""One request from its checked body to the pieces of its choices."""

import uuid
from collections.abc import AsyncIterator

from outrider.contract.generation import SamplingFields, Usage, sampling_params
from outrider.contract.sampling import SamplingParams
from outrider.server.engine import Engine, InvalidRequest
from outrider.server.pieces import Piece, PieceWriter, WholeWriter, join
from outrider.server.stops import StopTexts
from outrider.server.text import TextCodec


class Job:
    """A request that an engine is answering. Close it, whatever happens."""

    def __init__(
        self,
        engine: Engine,
        codec: TextCodec,
        body: SamplingFields,
        prompt: list[int],
        *,
        max_tokens: int | None,
        alternatives: int,
        offsets: bool = False,
        prefix: str,
    ) -> None:
        """max_tokens: None for what the context holds. alternatives: most likely tokens wanted beside each sampled
        one. offsets: where a token's text begins is wanted, too. prefix: of an id that the server makes.

        Raises InvalidRequest and Unavailable as the engine does.
        """
        self.prompt_tokens, self.generated_tokens = len(prompt), 0
        self.id = body.request_id or f"{prefix}-{uuid.uuid4().hex}"
        sampling = _sampling(body, _room(engine, prompt) if max_tokens is None else max_tokens, alternatives)
        stops = body.stops()
        by_token = body.stream or bool(stops)
        self._writers: list[PieceWriter] | list[WholeWriter]
        if by_token or offsets:
            prepared = StopTexts(stops)
            self._writers = [PieceWriter(codec, body, prepared) for _ in range(body.n)]
        else:
            self._writers = [WholeWriter(codec, body)] * body.n
        self._generation = engine.generate(prompt, sampling, body.n, self.id, by_token)

    async def pieces(self) -> AsyncIterator[Piece]:
        """What is added to one choice or another, until each has its last piece. Raises Unavailable."""
        running = set(range(len(self._writers)))
        async for delta in self._generation:
            if delta.index not in running:
                continue
            piece = self._writers[delta.index].write(delta)
            self.generated_tokens += piece.tokens
            if piece.finish_reason:
                running.remove(piece.index)
                if not delta.finish_reason:
                    self._generation.end_choice(piece.index)
            yield piece
            if not running:
                return

    async def choices(self) -> list[Piece]:
        """All choices, whole."""
        parts: list[list[Piece]] = [[] for _ in self._writers]
        async for piece in self.pieces():
            parts[piece.index].append(piece)
        return [pieces[0] if len(pieces) == 1 else join(pieces) for pieces in parts]

    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.generated_tokens,
            total_tokens=self.prompt_tokens + self.generated_tokens,
        )

    def close(self) -> None:
        """Nobody reads on: what still runs is stopped."""
        self._generation.close()


def _room(engine: Engine, prompt: list[int]) -> int:
    """Tokens that the context holds beside ``prompt``."""
    limit = engine.info().max_model_len
    if len(prompt) >= limit:
        raise InvalidRequest(
            f"prompt: {len(prompt)} tokens leave no room for a completion in this server's limit of {limit} "
            "(--max_model_len)",
            "prompt",
        )
    return limit - len(prompt)


def _sampling(body: SamplingFields, max_tokens: int, alternatives: int) -> SamplingParams:
    for token in body.logit_bias or ():
        if not (token.isascii() and token.isdecimal() and len(token) < 10 and str(int(token)) == token):
            raise InvalidRequest(f"logit_bias: {token[:40]!r} is no token id; the keys are token ids", "logit_bias")
    return sampling_params(body, max_tokens, alternatives)
