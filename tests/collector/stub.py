"""A little HTTP server that speaks the contract as badly as a test wants."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import msgspec
from aiohttp import web

from outrider.contract import routes
from outrider.contract.arrays import pack_floats, pack_ints
from outrider.contract.control import CommitRequest, ServerInfo, WeightStatus
from outrider.contract.errors import ErrorBody, ErrorDetail
from outrider.contract.generation import (
    PACKED_MEDIA_TYPE,
    ChoiceLogprobs,
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
    PackedChoice,
    PackedCompletion,
    Usage,
)
from tests.collector.servers import KEY, expected


@dataclass
class Stub:
    """What it answers. A figure is an HTTP status to refuse with; ``hang`` answers nothing at all, ``forget`` no
    completion. meeting: requests for one completion are answered only when so many have come. packs: whether it packs
    answers for those who take them. Asked for requests, it speaks of ``load``."""

    health: int = 200
    completions: int = 200
    metrics: int = 200
    stage: int = 200
    draining: bool = False
    hang: bool = False
    forget: bool = False
    packs: bool = False
    load: int = 0
    choices: Callable[[CompletionRequest], list[CompletionChoice]] = field(default=lambda request: plain(request))
    info: ServerInfo = field(default_factory=lambda: fitting_info())
    meeting: asyncio.Barrier | None = None
    url: str = ""
    requests: list[CompletionRequest] = field(default_factory=list)
    commits: list[CommitRequest] = field(default_factory=list)

    @property
    def asked(self) -> int:
        return len(self.requests)

    async def on_health(self, request: web.Request) -> web.Response:
        return web.Response() if self.health == 200 else refuse(self.health, "the engine stopped: out of luck")

    async def on_info(self, request: web.Request) -> web.Response:
        if self.hang:
            await asyncio.sleep(600)
        self.info.draining = self.draining
        return answer(self.info)

    async def on_completion(self, request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read(), type=CompletionRequest)
        self.requests.append(body)
        if self.hang or self.forget:
            await asyncio.sleep(600)
        if self.meeting is not None and body.n == 1:
            await self.meeting.wait()
        if self.completions != 200:
            return refuse(self.completions, "not now")
        usage = Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2)
        choices = self.choices(body)
        if self.packs and PACKED_MEDIA_TYPE in request.headers["Accept"]:
            packed = PackedCompletion(id="1", choices=[pack(choice) for choice in choices], usage=usage)
            return web.Response(body=msgspec.msgpack.encode(packed), content_type=PACKED_MEDIA_TYPE)
        return answer(CompletionResponse(id="1", created=0, model="stub", choices=choices, usage=usage))

    async def on_metrics(self, request: web.Request) -> web.Response:
        if self.metrics != 200:
            return refuse(self.metrics, "none here")
        gauges = {"running": self.load, "waiting": 0, "swapped": 7}
        lines = [f'vllm:num_requests_{name}{{model_name="stub"}} {float(value)}' for name, value in gauges.items()]
        return web.Response(text="# HELP\n" + "\n".join(lines) + "\n")

    async def on_stage(self, request: web.Request) -> web.Response:
        return refuse(self.stage, "no room") if self.stage != 200 else answer(self.status())

    async def on_commit(self, request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read(), type=CommitRequest)
        self.commits.append(body)
        self.info.version, self.info.run_id = body.version, body.run_id
        return answer(self.status())

    def status(self) -> WeightStatus:
        return WeightStatus(version=self.info.version, run_id=self.info.run_id, state="idle")


def fitting_info() -> ServerInfo:
    """A server that a trainer of the demo's model can use."""
    wanted = expected()
    return ServerInfo(
        engine="torch", engine_version="0", model=wanted.model, model_fingerprint=wanted.model_fingerprint,
        tokenizer_hash=wanted.tokenizer_hash, torch_dtype="float32", max_model_len=256, max_num_seqs=8, vocab_size=99,
        version=0, run_id="", host="elsewhere", capabilities=("inflight_keep",),
    )  # fmt: skip


def choice(tokens: list[int], reason: str = "stop", *, index: int = 0, logprobs: int | None = None) -> CompletionChoice:
    """A completion of version 0. logprobs: how many log-probabilities come with it, if not one a token."""
    count = len(tokens) if logprobs is None else logprobs
    return CompletionChoice(
        index=index, text="", finish_reason=reason, token_ids=tokens,  # type: ignore[arg-type]
        logprobs=ChoiceLogprobs(token_logprobs=[-1.0] * count), weight_versions=[(0, len(tokens))] if tokens else [],
    )  # fmt: skip


def plain(request: CompletionRequest) -> list[CompletionChoice]:
    return [choice([21, 22], index=index) for index in range(request.n)]


def pack(chosen: CompletionChoice) -> PackedChoice:
    """The same, packed."""
    assert chosen.finish_reason is not None
    assert chosen.logprobs is not None
    return PackedChoice(
        index=chosen.index, text=chosen.text, finish_reason=chosen.finish_reason,
        token_ids=pack_ints(chosen.token_ids), logprobs=pack_floats(chosen.logprobs.token_logprobs),
        weight_versions=chosen.weight_versions or [],
    )  # fmt: skip


def answer(value: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


def refuse(status: int, message: str) -> web.Response:
    body = msgspec.json.encode(ErrorBody(ErrorDetail(message=message)))
    return web.Response(body=body, status=status, content_type="application/json")


@contextlib.asynccontextmanager
async def serving(stub: Stub) -> AsyncIterator[Stub]:
    """The stub on a port of its own. Requests without the key are refused, as everywhere."""

    @web.middleware
    async def check_key(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.path != routes.HEALTH and request.headers.get("Authorization") != f"Bearer {KEY}":
            return refuse(401, "this server needs its API key")
        return await handler(request)

    app = web.Application(middlewares=[check_key])
    app.router.add_get(routes.HEALTH, stub.on_health)
    app.router.add_get(routes.INFO, stub.on_info)
    app.router.add_get(routes.METRICS, stub.on_metrics)
    app.router.add_post(routes.COMPLETIONS, stub.on_completion)
    app.router.add_post(routes.STAGE, stub.on_stage)
    app.router.add_post(routes.COMMIT, stub.on_commit)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    stub.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield stub
    finally:
        await runner.cleanup()
