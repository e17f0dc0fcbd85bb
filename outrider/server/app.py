"""The HTTP application: the server contract over any engine."""

from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from outrider.contract import routes
from outrider.contract.chat import ChatRequest
from outrider.contract.control import CommitRequest, DrainStatus, StageRequest
from outrider.contract.errors import ErrorDetail
from outrider.contract.generation import CompletionRequest, ModelCard, ModelList, SamplingFields
from outrider.server.answers import Handler, answering, error_answer, json_answer
from outrider.server.auth import KeyMiddleware
from outrider.server.bodies import read_body
from outrider.server.chat import Chats
from outrider.server.completions import Completions
from outrider.server.engine import Conflict, Engine, InvalidRequest, Unavailable
from outrider.server.metrics import EngineCollector
from outrider.server.reach import reaching
from outrider.server.text import TextCodec


class ServerApp:
    """Routes of one server. ``drain`` is also what SIGTERM calls."""

    def __init__(self, engine: Engine, text: TextCodec, served_name: str) -> None:
        self.engine, self.served_name = engine, served_name
        self.draining = False
        self._completions = Completions(engine, text, served_name)
        self._chats = Chats(engine, text, served_name)
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine, served_name))

    def metric_names(self) -> frozenset[str]:
        """Of the metrics that it gives."""
        return frozenset(metric.name for metric in self.registry.collect())

    def asgi(self, key: str, more: BaseRoute | None = None) -> ASGIApp:
        """The application, behind the key. more: routes besides the contract's, behind the same key."""
        handlers: list[tuple[str, Handler, str]] = [
            (routes.HEALTH, self.health, "GET"),
            (routes.METRICS, self.metrics, "GET"),
            (routes.MODELS, self.models, "GET"),
            (routes.COMPLETIONS, self.completions, "POST"),
            (routes.CHAT, self.chat, "POST"),
            (routes.INFO, self.info, "GET"),
            (routes.STAGE, self.stage, "POST"),
            (routes.COMMIT, self.commit, "POST"),
            (routes.STATUS, self.status, "GET"),
            (routes.REACH, reaching(key), "POST"),
            (routes.DRAIN, self.drain_route, "POST"),
        ]
        return contract_app(handlers, key, more)

    async def drain(self, timeout: float) -> None:
        """Take no new requests, and let the running ones end within ``timeout`` seconds."""
        self.draining = True
        await self.engine.drain(timeout)

    async def health(self, request: Request) -> Response:
        failure = self.engine.failure()
        if failure:
            return error_answer(503, ErrorDetail(message=failure, type="server_error"))
        return Response(status_code=200)

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        limit = self.engine.info().max_model_len
        return json_answer(ModelList(data=[ModelCard(id=self.served_name, max_model_len=limit)]))

    async def completions(self, request: Request) -> Response:
        body = await read_body(request, CompletionRequest)
        self._admit(request, body)
        return await self._completions.answer(request, body)

    async def chat(self, request: Request) -> Response:
        body = await read_body(request, ChatRequest)
        self._admit(request, body)
        return await self._chats.answer(request, body)

    async def info(self, request: Request) -> Response:
        info = self.engine.info()
        info.draining = self.draining
        return json_answer(info)

    async def stage(self, request: Request) -> Response:
        return json_answer(await self.engine.stage((await read_body(request, StageRequest)).manifest))

    async def commit(self, request: Request) -> Response:
        body = await read_body(request, CommitRequest)
        return json_answer(await self.engine.commit(body.run_id, body.version, body.inflight))

    async def status(self, request: Request) -> Response:
        return json_answer(self.engine.status())

    async def drain_route(self, request: Request) -> Response:
        self.draining = True
        return json_answer(DrainStatus(draining=True, running=self.engine.load().running))

    def _admit(self, request: Request, body: SamplingFields) -> None:
        """Whether the request is for this server as it is now, after its body has arrived. Which weights sample each
        token from here on is in the answer."""
        if self.draining:
            raise Unavailable("this server is draining and takes no new requests; use another one")
        wanted, serving = request.headers.get(routes.RUN_HEADER), self.engine.status().run_id
        if wanted is not None and wanted != serving:
            raise Conflict(f"weights of run {wanted!r} are asked for, those of run {serving!r} are in use here")
        if body.model is not None and body.model != self.served_name:
            raise InvalidRequest(f"model: {body.model!r} is not served here, {self.served_name!r} is", "model")
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options: goes with stream true only", "stream_options")


def contract_app(handlers: list[tuple[str, Handler, str]], key: str, more: BaseRoute | None = None) -> ASGIApp:
    """An application of ``(path, handler, method)``, behind the key, whose errors are all in OpenAI's shape. more:
    further routes."""
    known: list[BaseRoute] = [Route(path, answering(handler), methods=[verb]) for path, handler, verb in handlers]
    app = Starlette(routes=known if more is None else [*known, more])
    app.add_exception_handler(404, _not_found)
    app.add_exception_handler(405, _not_allowed)
    return KeyMiddleware(app, key)


async def _not_found(request: Request, error: Exception) -> Response:
    return error_answer(404, ErrorDetail(message=f"{request.method} {request.url.path}: no such route"))


async def _not_allowed(request: Request, error: Exception) -> Response:
    """405; the header that Starlette gives it says which methods there are."""
    headers: dict[str, str] = getattr(error, "headers", None) or {}
    allowed = headers.get("Allow", "")
    message = f"{request.method} {request.url.path}: no such method on this route; it has {allowed}"
    answer = error_answer(405, ErrorDetail(message=message))
    answer.headers.update(headers)
    return answer
