"""The ASGI middleware of vLLM's server: the key, the server contract, and vLLM's own routes behind them."""

import asyncio
import logging
import os
import signal
from typing import Any

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outrider.contract.errors import UserError
from outrider.contract.garbage import search_less_often
from outrider.contract.keys import client_key
from outrider.contract.routes import SERVER_ROUTES
from outrider.server.app import ServerApp
from outrider.server.connections import PatientProtocol
from outrider.server.model_facts import declared_stops, load_config, server_info, stop_tokens
from outrider.server.text import load_text
from outrider.server.vllm_engine.differences import stop_reading
from outrider.server.vllm_engine.engine import VllmEngine
from outrider.server.vllm_engine.settings import CANNOT_START, settings_from_environment
from outrider.server.vllm_engine.stats import OtherMetrics
from outrider.server.vllm_engine.weights import VllmWeights, tensor_shapes


class OutriderMiddleware:
    """Goes around all of vLLM's server. Nothing is served before the engines are ready for new weights."""

    def __init__(self, app: ASGIApp) -> None:
        self.stock = app
        self.settings = settings_from_environment()
        # vLLM configures its own logger and nobody else's.
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger = logging.getLogger("outrider")
        logger.addHandler(handler)
        logger.setLevel(self.settings.config.log_level.upper())
        self.server: ServerApp | None = None
        self.client: Any = None
        self._asgi: ASGIApp | None = None
        self._answering = 0
        self._stopping: asyncio.Task[None] | None = None
        self._signals = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        assert self._asgi is not None  # connections are taken after the lifespan has begun
        self._answering += 1
        try:
            await self._asgi(scope, receive, send)
        finally:
            self._answering -= 1

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Start when vLLM's own application has, and say so only then."""

        async def watched(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    await self._start(scope["app"])
                except UserError as error:
                    message = {"type": "lifespan.startup.failed", "message": f"{CANNOT_START}{error}"}
            await send(message)

        await self.stock(scope, receive, watched)
        if self.server is not None:
            await self.server.engine.close()

    async def _start(self, app: Any) -> None:
        config, client = self.settings.config, app.state.engine_client
        self.client, key = client, client_key(None)
        text, model_config = load_text(config.model), load_config(config.model)
        vllm_model = client.model_config
        info = server_info(
            config,
            model_config,
            text.tokenizer,
            engine="vllm",
            engine_version=_vllm_version(),
            torch_dtype=str(vllm_model.dtype).removeprefix("torch."),
            max_model_len=vllm_model.max_model_len,
            max_num_seqs=self.settings.engine_seqs * self.settings.engines,
        )
        weights = VllmWeights(tensor_shapes(model_config), vllm_model.dtype, info.model_fingerprint, key)
        stops = frozenset(stop_tokens(declared_stops(config.model), text.tokenizer.eos_token_id))
        engine = VllmEngine(client, self.settings, info, stops, weights)
        self.server = ServerApp(engine, text, config.model)
        self.server.registry.register(OtherMetrics(self.server.metric_names()))
        self._asgi = self.server.asgi(key, StockRoutes(app, self.stock))
        await engine.start()
        search_less_often()
        # Clients that do not get on with their request lose their connection here, too.
        app.state.server.config.http_protocol_class = PatientProtocol
        # vLLM's own handler cuts off what is running; it is left in place for SIGINT.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._on_signal)

    def _on_signal(self) -> None:
        """The first signal drains, a second one cuts off what is still running."""
        self._signals += 1
        if self._stopping is not None:
            self._stopping.cancel()
        timeout = self.settings.config.drain_timeout if self._signals == 1 else 0.0
        self._stopping = asyncio.get_running_loop().create_task(self._stop(timeout))

    async def _stop(self, timeout: float) -> None:
        assert self.server is not None
        try:
            await self.server.drain(timeout)
            for _ in range(100):  # answers still have to be written
                if not self._answering:
                    break
                await asyncio.sleep(0.05)
        except Exception:
            logging.getLogger(__name__).exception("draining failed; the server ends")
        stop_reading(self.client)
        os.kill(os.getpid(), signal.SIGINT)


class StockRoutes(BaseRoute):
    """Routes of vLLM's server that the contract does not have; all of them need the key."""

    def __init__(self, app: Any, stock: ASGIApp) -> None:
        self.app, self.stock = app, stock

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        known = scope["path"] not in SERVER_ROUTES and any(
            route.matches(scope)[0] != Match.NONE for route in self.app.router.routes
        )
        return (Match.FULL if known else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self.app
        await self.stock(scope, receive, send)


def _vllm_version() -> str:
    import vllm

    return str(vllm.__version__)
