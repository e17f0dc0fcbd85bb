"""The HTTP application: the server contract over any engine."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from outrider.contract import routes
from outrider.contract.control import CommitRequest, DrainStatus, StageRequest
from outrider.contract.errors import ErrorBody, ErrorDetail
from outrider.contract.generation import CompletionRequest, CompletionResponse, ModelCard, ModelList, Usage
from outrider.server.auth import KeyMiddleware
from outrider.server.engine import Conflict, Engine, InvalidRequest, Unavailable
from outrider.server.metrics import EngineCollector

log = logging.getLogger(__name__)

#: Largest body of a request, bytes.
MAX_BODY = 32 * 1024 * 1024

Body = TypeVar("Body", bound=msgspec.Struct)
Handler = Callable[[Request], Awaitable[Response]]

#: Status and OpenAI error type of what an engine raises.
_STATUSES: dict[type[Exception], tuple[int, str]] = {
    InvalidRequest: (400, "invalid_request_error"),
    Conflict: (409, "conflict_error"),
    Unavailable: (503, "server_error"),
}


class ServerApp:
    """Routes of one server. ``drain`` is also what SIGTERM calls."""

    def __init__(self, engine: Engine, served_name: str) -> None:
        self.engine, self.served_name = engine, served_name
        self.draining = False
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine, served_name))

    def asgi(self, key: str) -> ASGIApp:
        """The application, behind the key."""
        handlers: list[tuple[str, Handler, str]] = [
            (routes.HEALTH, self.health, "GET"),
            (routes.METRICS, self.metrics, "GET"),
            (routes.MODELS, self.models, "GET"),
            (routes.COMPLETIONS, self.completions, "POST"),
            (routes.INFO, self.info, "GET"),
            (routes.STAGE, self.stage, "POST"),
            (routes.COMMIT, self.commit, "POST"),
            (routes.STATUS, self.status, "GET"),
            (routes.DRAIN, self.drain_route, "POST"),
        ]
        app = Starlette(routes=[Route(path, _answering(handler), methods=[verb]) for path, handler, verb in handlers])
        app.add_exception_handler(404, _not_found)
        app.add_exception_handler(405, _not_found)
        return KeyMiddleware(app, key)

    async def drain(self, timeout: float) -> None:
        """Take no new requests, and let the running ones end within ``timeout`` seconds."""
        self.draining = True
        await self.engine.drain(timeout)

    async def health(self, request: Request) -> Response:
        failure = self.engine.failure()
        return _error(503, failure, "server_error") if failure else Response(status_code=200)

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        return _json(ModelList(data=[ModelCard(id=self.served_name, max_model_len=self.engine.info().max_model_len)]))

    async def completions(self, request: Request) -> Response:
        body = await _body(request, CompletionRequest)
        # Only now: the server may have changed while the body was arriving.
        if self.draining:
            raise Unavailable("this server is draining and takes no new requests; use another one")
        wanted, serving = request.headers.get(routes.RUN_HEADER), self.engine.status().run_id
        if wanted is not None and wanted != serving:
            raise Conflict(f"weights of run {wanted!r} are asked for, those of run {serving!r} are in use here")
        if body.model is not None and body.model != self.served_name:
            raise InvalidRequest(f"model: {body.model!r} is not served here, {self.served_name!r} is", "model")
        prompt = self.engine.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
        request_id = body.request_id or f"cmpl-{uuid.uuid4().hex}"
        generation = self.engine.generate(prompt, body.sampling(), body.n, request_id)
        choices = await _unless_disconnected(request, generation)
        generated = sum(len(choice.token_ids or ()) for choice in choices)
        for choice in choices:
            if not body.return_token_ids:
                choice.token_ids = choice.weight_versions = None
            if body.logprobs is None:
                choice.logprobs = None
        usage = Usage(prompt_tokens=len(prompt), completion_tokens=generated, total_tokens=len(prompt) + generated)
        return _json(
            CompletionResponse(
                id=request_id, created=int(time.time()), model=self.served_name, choices=choices, usage=usage
            )
        )

    async def info(self, request: Request) -> Response:
        info = self.engine.info()
        info.draining = self.draining
        return _json(info)

    async def stage(self, request: Request) -> Response:
        return _json(await self.engine.stage((await _body(request, StageRequest)).manifest))

    async def commit(self, request: Request) -> Response:
        body = await _body(request, CommitRequest)
        return _json(await self.engine.commit(body.run_id, body.version))

    async def status(self, request: Request) -> Response:
        return _json(self.engine.status())

    async def drain_route(self, request: Request) -> Response:
        self.draining = True
        return _json(DrainStatus(draining=True, running=self.engine.load().running))


Result = TypeVar("Result")


async def _unless_disconnected(request: Request, work: Awaitable[Result]) -> Result:
    """Await ``work``, cancelling it when the client goes away (then nobody reads the answer)."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        watch.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, kind: type[Body]) -> Body:
    """Decode the body. Raises InvalidRequest naming the field at fault."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise InvalidRequest(f"the body is larger than {MAX_BODY // 2**20} MiB")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        problem, field = _offender(str(error))
        raise InvalidRequest(f"{field}: {problem}" if field else problem, field) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error


def _offender(message: str) -> tuple[str, str | None]:
    """What is wrong, and with which field, in msgspec's words: the path names only the object around a field that is
    unknown or missing."""
    problem, _, path = message.partition(" - at `$.")
    around = path.rstrip("`")
    named = re.search(r"(?:unknown|required) field `([^`]*)`", problem)
    return problem, ".".join(part for part in (around, named[1] if named else "") if part) or None


def _answering(handler: Handler) -> Handler:
    """Turn what a handler raises into an answer in OpenAI's error shape."""

    async def route(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=499)
        except (InvalidRequest, Conflict, Unavailable) as error:
            status, kind = _STATUSES[type(error)]
            return _error(status, str(error), kind, getattr(error, "param", None))
        except Exception as error:  # the client must hear what went wrong, not a closed connection
            log.exception("%s failed", request.url.path)
            return _error(500, f"{type(error).__name__}: {error}", "server_error")

    return route


async def _not_found(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return _error(status, f"{request.method} {request.url.path}: no such route", "invalid_request_error")


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _error(status: int, message: str, kind: str, param: str | None = None) -> Response:
    detail = ErrorDetail(message=message, type=kind, param=param)
    return Response(msgspec.json.encode(ErrorBody(detail)), status_code=status, media_type="application/json")
