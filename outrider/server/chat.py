"""``/v1/chat/completions``: a conversation, continued in the words of the model's template."""

import time
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response

from outrider.contract.arrays import unpack_ints
from outrider.contract.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatResponse,
)
from outrider.server.answers import json_answer
from outrider.server.engine import Engine, InvalidRequest
from outrider.server.jobs import Job
from outrider.server.logprobs import chat_logprobs
from outrider.server.pieces import Piece
from outrider.server.presence import while_connected
from outrider.server.streaming import EventStream, wants_usage
from outrider.server.text import TextCodec


class Chats:
    """Answers chat requests whose body has been checked."""

    def __init__(self, engine: Engine, codec: TextCodec, served_name: str) -> None:
        self.engine, self.codec, self.served_name = engine, codec, served_name

    async def answer(self, request: Request, body: ChatRequest) -> Response:
        """Raises InvalidRequest, Unavailable, and ClientDisconnect when nobody waits any more."""
        job = await self._job(body)
        if body.stream:
            return EventStream(self._chunks(job, body), job.close)
        try:
            async with while_connected(request.receive):
                pieces = await job.choices()
        finally:
            job.close()
        answer = ChatResponse(
            id=job.id,
            created=int(time.time()),
            model=self.served_name,
            choices=[self._choice(piece, body) for piece in pieces],
            usage=job.usage(),
        )
        return json_answer(answer)

    async def _job(self, body: ChatRequest) -> Job:
        if body.top_logprobs is not None and not body.logprobs:
            raise InvalidRequest("top_logprobs: goes with logprobs true only", "top_logprobs")
        max_tokens = _max_tokens(body)
        prompt = await self.codec.render(body, self.engine.info().max_model_len)
        try:
            return Job(
                self.engine, self.codec, body, prompt,
                max_tokens=max_tokens, alternatives=body.top_logprobs or 0, prefix="chatcmpl",
            )  # fmt: skip
        except InvalidRequest as error:
            if error.param == "prompt":  # which is what the template made of the messages
                raise InvalidRequest(f"messages, once rendered: {error}", "messages") from error
            raise

    async def _chunks(self, job: Job, body: ChatRequest) -> AsyncIterator[ChatChunk]:
        created = int(time.time())
        begun: set[int] = set()
        async for piece in job.pieces():
            tokens_wanted = (body.return_token_ids or body.logprobs) and piece.tokens
            if piece.text or piece.finish_reason or tokens_wanted or piece.index not in begun:
                choice = self._chunk_choice(piece, body, first=piece.index not in begun)
                begun.add(piece.index)
                yield ChatChunk(id=job.id, created=created, model=self.served_name, choices=[choice])
        if wants_usage(body):
            yield ChatChunk(id=job.id, created=created, model=self.served_name, choices=[], usage=job.usage())

    def _choice(self, piece: Piece, body: ChatRequest) -> ChatChoice:
        choice = ChatChoice(
            index=piece.index,
            message=ChatMessage(content=piece.text),
            finish_reason=piece.finish_reason or "abort",
            logprobs=self._logprobs(piece, body),
            stop_reason=piece.stop_reason,
        )
        if body.return_token_ids:
            choice.token_ids, choice.weight_versions = unpack_ints(piece.token_ids).tolist(), piece.versions
        return choice

    def _chunk_choice(self, piece: Piece, body: ChatRequest, first: bool) -> ChatChunkChoice:
        choice = ChatChunkChoice(
            index=piece.index,
            delta=ChatDelta(role="assistant" if first else None, content=piece.text),
            finish_reason=piece.finish_reason,
            logprobs=self._logprobs(piece, body),
            stop_reason=piece.stop_reason,
        )
        if body.return_token_ids:
            choice.token_ids, choice.weight_versions = unpack_ints(piece.token_ids).tolist(), piece.versions
        return choice

    def _logprobs(self, piece: Piece, body: ChatRequest) -> ChatLogprobs | None:
        return chat_logprobs(piece, body.top_logprobs or 0, self.codec) if body.logprobs else None


def _max_tokens(body: ChatRequest) -> int | None:
    """The limit under either of its names."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            f"max_completion_tokens: {new} contradicts max_tokens {old}, its older name; give one of them",
            "max_completion_tokens",
        )
    return old if new is None else new
