"""Several vLLM servers on the same devices behind one port.

A small model leaves a GPU idle while one engine's Python prepares its next step: two engines that take turns serve
twice as much. Each is a whole server, with its own copy of the weights; requests go to the one with fewest of them in
flight, and what changes weights goes to all.
"""

import asyncio
from collections.abc import AsyncIterator
from http import HTTPStatus

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from outrider.contract import routes
from outrider.contract.control import DrainStatus, ServerInfo, WeightStatus
from outrider.contract.errors import ErrorDetail
from outrider.server.answers import Handler, error_answer, json_answer
from outrider.server.app import contract_app
from outrider.server.engine import Unavailable
from outrider.server.reach import reaching

#: Headers that belong to one connection and not to a message.
_HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"te", b"host"})
#: Metrics of which the servers' mean counts, and not their sum.
_MEANS = frozenset({"vllm:kv_cache_usage_perc", "outrider:weight_version", "outrider:weight_stage_seconds",
                    "outrider:weight_commit_seconds", "outrider:engine_idle_seconds_total"})  # fmt: skip


class Backend:
    """One of the servers. serving: it holds the weights that the others hold."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.in_flight = 0
        self.serving = True


class Router:
    """The server contract over several servers that have it."""

    def __init__(self, backends: list[Backend], key: str) -> None:
        self.backends, self.key = backends, key
        self.draining = False
        self._session: aiohttp.ClientSession | None = None

    def asgi(self) -> ASGIApp:
        """The application, behind the key."""
        handlers: list[tuple[str, Handler, str]] = [
            (routes.HEALTH, self.health, "GET"),
            (routes.METRICS, self.metrics, "GET"),
            (routes.MODELS, self.forward, "GET"),
            (routes.COMPLETIONS, self.forward, "POST"),
            (routes.CHAT, self.forward, "POST"),
            (routes.INFO, self.info, "GET"),
            (routes.STAGE, self.stage, "POST"),
            (routes.COMMIT, self.commit, "POST"),
            (routes.STATUS, self.status, "GET"),
            (routes.REACH, reaching(self.key), "POST"),
            (routes.DRAIN, self.drain, "POST"),
        ]
        return contract_app(handlers, self.key)

    async def start(self) -> None:
        """Get ready to ask the servers."""
        self._session = aiohttp.ClientSession(
            # Shorter than the servers keep idle connections: none is used that they are just closing.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2),
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"Authorization": f"Bearer {self.key}"},
            auto_decompress=False,
        )

    async def close(self) -> None:
        """Close the connections to them."""
        if self._session is not None:
            await self._session.close()

    # ---- data plane --------------------------------------------------------------------------------------------

    async def forward(self, request: Request) -> Response:
        """Have the least loaded server answer."""
        ready = [backend for backend in self.backends if backend.serving]
        if not ready:
            raise Unavailable("no engine holds the weights in use; stage and commit a version")
        return _Forwarded(self.session, min(ready, key=lambda backend: backend.in_flight), request)

    # ---- control plane -----------------------------------------------------------------------------------------

    async def stage(self, request: Request) -> Response:
        """On all of them; an answer is good when all are."""
        return self._joint(await self._ask_all("POST", routes.STAGE, await request.body()))

    async def commit(self, request: Request) -> Response:
        """On all of them. One that fails serves no more until it has taken a later version."""
        answers = await self._ask_all("POST", routes.COMMIT, await request.body())
        if any(status == HTTPStatus.OK for status, _ in answers):
            for backend, (status, _) in zip(self.backends, answers, strict=True):
                backend.serving = status == HTTPStatus.OK
        return self._joint(answers)

    async def status(self, request: Request) -> Response:
        return self._joint(await self._ask_all("GET", routes.STATUS))

    async def info(self, request: Request) -> Response:
        answers = await self._ask_all("GET", routes.INFO)
        if bad := _first_bad(answers):
            return bad
        infos = [msgspec.json.decode(body, type=ServerInfo) for _, body in answers]
        infos[0].max_num_seqs = sum(info.max_num_seqs for info in infos)
        infos[0].draining = self.draining or any(info.draining for info in infos)
        return json_answer(infos[0])

    async def drain(self, request: Request) -> Response:
        self.draining = True
        answers = await self._ask_all("POST", routes.DRAIN)
        if bad := _first_bad(answers):
            return bad
        running = sum(msgspec.json.decode(body, type=DrainStatus).running for _, body in answers)
        return json_answer(DrainStatus(draining=True, running=running))

    async def health(self, request: Request) -> Response:
        return _first_bad(await self._ask_all("GET", routes.HEALTH)) or Response(status_code=200)

    async def metrics(self, request: Request) -> Response:
        answers = await self._ask_all("GET", routes.METRICS)
        if bad := _first_bad(answers):
            return bad
        return Response(sum_metrics([body.decode() for _, body in answers]), media_type="text/plain; version=0.0.4")

    # ---- asking ------------------------------------------------------------------------------------------------

    @property
    def session(self) -> aiohttp.ClientSession:
        assert self._session is not None
        return self._session

    async def _ask_all(self, verb: str, path: str, body: bytes | None = None) -> list[tuple[int, bytes]]:
        async def ask(backend: Backend) -> tuple[int, bytes]:
            try:
                async with self.session.request(verb, backend.url + path, data=body) as answer:
                    return answer.status, await answer.read()
            except aiohttp.ClientError as error:
                detail = ErrorDetail(
                    message=f"an engine behind this server does not answer: {error}", type="server_error"
                )
                return 503, bytes(error_answer(503, detail).body)

        return list(await asyncio.gather(*map(ask, self.backends)))

    def _joint(self, answers: list[tuple[int, bytes]]) -> Response:
        """The weight status of all: of several, the one that is furthest behind, with the longest times."""
        if bad := _first_bad(answers):
            return bad
        states = [msgspec.json.decode(body, type=WeightStatus) for _, body in answers]
        order = ["failed", "staging", "idle", "staged"]
        status = min(states, key=lambda state: (state.version, order.index(state.state)))
        status.stage_seconds = max(state.stage_seconds for state in states)
        status.commit_seconds = max(state.commit_seconds for state in states)
        return json_answer(status)


class _Forwarded(Response):
    """A server's answer, handed on as it comes. Its client's going away ends the request there, too."""

    def __init__(self, session: aiohttp.ClientSession, backend: Backend, request: Request) -> None:
        super().__init__()
        self.session, self.backend, self.request = session, backend, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, self.backend.in_flight = self.request, self.backend.in_flight + 1
        headers = [(name, value) for name, value in request.headers.raw if name not in _HOP_BY_HOP]
        gone = asyncio.Event()
        try:
            answer = self.session.request(
                request.method,
                self.backend.url + request.url.path,
                data=_body(request, gone) if request.method == "POST" else None,
                headers=[(name.decode(), value.decode("latin-1")) for name, value in headers],
            )
            asking = asyncio.create_task(_relay(answer, send))
            leaving = asyncio.create_task(_left(receive, gone))
            await asyncio.wait({asking, leaving}, return_when=asyncio.FIRST_COMPLETED)
            leaving.cancel()
            asking.cancel()
            await asyncio.gather(asking, leaving, return_exceptions=True)
            if not asking.cancelled() and (error := asking.exception()):
                raise error
        except aiohttp.ClientError as error:
            await _no_answer(error)(scope, receive, send)
        finally:
            self.backend.in_flight -= 1


async def _body(request: Request, read: asyncio.Event) -> AsyncIterator[bytes]:
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect:
        raise aiohttp.ClientPayloadError("the client went away") from None
    finally:
        read.set()


async def _left(receive: Receive, read: asyncio.Event) -> None:
    """Until the client has gone; its body has to be read first."""
    await read.wait()
    while (await receive())["type"] != "http.disconnect":
        pass


async def _relay(asking: "aiohttp.client._RequestContextManager", send: Send) -> None:
    async with asking as answer:
        raw = [(name.lower(), value) for name, value in answer.raw_headers if name.lower() not in _HOP_BY_HOP]
        await send({"type": "http.response.start", "status": answer.status, "headers": raw})
        async for chunk in answer.content.iter_any():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _no_answer(error: aiohttp.ClientError) -> Response:
    message = f"an engine behind this server does not answer: {error}"
    return error_answer(503, ErrorDetail(message=message, type="server_error"))


def _first_bad(answers: list[tuple[int, bytes]]) -> Response | None:
    for status, body in answers:
        if status != HTTPStatus.OK:
            return Response(body, status, media_type="application/json")
    return None


def sum_metrics(texts: list[str]) -> str:
    """Expositions of several servers as one: sums, or means where sums mean nothing."""
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    kinds: dict[str, tuple[str, str]] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            kinds[family.name] = (family.type, family.documentation)
            samples = values.setdefault(family.name, {})
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                share = sample.value / len(texts) if sample.name in _MEANS else sample.value
                samples[key] = samples.get(key, 0.0) + share
    lines = []
    for name, samples in values.items():
        kind, documentation = kinds[name]
        shown = f"{name}_total" if kind == "counter" else name
        lines += [f"# HELP {shown} {documentation}", f"# TYPE {shown} {kind}"]
        for (sample_name, labels), value in samples.items():
            inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
            lines.append(f"{sample_name}{{{inner}}} {value}" if inner else f"{sample_name} {value}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
