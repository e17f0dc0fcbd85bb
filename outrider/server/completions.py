"""``/v1/completions``: a text or tokens, continued."""

import time
from collections.abc import AsyncIterator

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from outrider.contract.arrays import unpack_ints
from outrider.contract.generation import (
    PACKED_MEDIA_TYPE,
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
    PackedChoice,
    PackedCompletion,
)
from outrider.server.answers import json_answer
from outrider.server.engine import Engine
from outrider.server.jobs import Job
from outrider.server.logprobs import completion_logprobs
from outrider.server.pieces import Piece
from outrider.server.presence import while_connected
from outrider.server.streaming import EventStream, wants_usage
from outrider.server.text import TextCodec

_pack = msgspec.msgpack.Encoder().encode


class Completions:
    """Answers completion requests whose body has been checked."""

    def __init__(self, engine: Engine, codec: TextCodec, served_name: str) -> None:
        self.engine, self.codec, self.served_name = engine, codec, served_name

    async def answer(self, request: Request, body: CompletionRequest) -> Response:
        """Raises InvalidRequest, Unavailable, and ClientDisconnect when nobody waits any more."""
        limit = self.engine.info().max_model_len
        prompt = await self.codec.encode(body.prompt, limit) if isinstance(body.prompt, str) else body.prompt
        alternatives = body.logprobs or 0
        job = Job(
            self.engine, self.codec, body, prompt,
            max_tokens=body.max_tokens, alternatives=alternatives, offsets=alternatives > 0, prefix="cmpl",
        )  # fmt: skip
        if body.stream:
            return EventStream(self._chunks(job, body), job.close)
        try:
            async with while_connected(request.receive):
                pieces = await job.choices()
        finally:
            job.close()
        if body.return_token_ids and body.logprobs == 0 and PACKED_MEDIA_TYPE in request.headers.get("accept", ""):
            return Response(_pack(_packed(job, pieces)), media_type=PACKED_MEDIA_TYPE)
        answer = self._response(job, int(time.time()), [self._choice(piece, body) for piece in pieces])
        answer.usage = job.usage()
        return json_answer(answer)

    async def _chunks(self, job: Job, body: CompletionRequest) -> AsyncIterator[CompletionResponse]:
        created = int(time.time())
        tokens_wanted = body.return_token_ids or body.logprobs is not None
        async for piece in job.pieces():
            if piece.text or piece.finish_reason or (tokens_wanted and piece.tokens):
                yield self._response(job, created, [self._choice(piece, body)])
        if wants_usage(body):
            last = self._response(job, created, [])
            last.usage = job.usage()
            yield last

    def _response(self, job: Job, created: int, choices: list[CompletionChoice]) -> CompletionResponse:
        return CompletionResponse(id=job.id, created=created, model=self.served_name, choices=choices)

    def _choice(self, piece: Piece, body: CompletionRequest) -> CompletionChoice:
        choice = CompletionChoice(
            index=piece.index, text=piece.text, finish_reason=piece.finish_reason, stop_reason=piece.stop_reason
        )
        if body.return_token_ids:
            choice.token_ids, choice.weight_versions = unpack_ints(piece.token_ids).tolist(), piece.versions
        if body.logprobs is not None:
            choice.logprobs = completion_logprobs(piece, body.logprobs, self.codec)
        return choice


def _packed(job: Job, pieces: list[Piece]) -> PackedCompletion:
    """The collector's answer: arrays go from the engine to the wire as they are."""
    choices = [
        PackedChoice(
            index=piece.index,
            text=piece.text,
            finish_reason=piece.finish_reason or "abort",
            token_ids=piece.token_ids,
            logprobs=piece.logprobs,
            weight_versions=piece.versions,
        )
        for piece in pieces
    ]
    return PackedCompletion(id=job.id, choices=choices, usage=job.usage())
