"""``outrider rollout``: bind the port, load the engine, serve, drain."""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn

from outrider.contract.errors import UserError
from outrider.contract.garbage import search_less_often
from outrider.contract.threads import yield_idle_threads
from outrider.server.app import ServerApp
from outrider.server.auth import server_key
from outrider.server.config import RolloutConfig
from outrider.server.connections import http_settings
from outrider.server.engine import Unavailable
from outrider.server.ready import ready_message
from outrider.server.torch_engine.forking import prepare

log = logging.getLogger(__name__)


def serve(config: RolloutConfig) -> int:
    """Run one server until it is told to stop. Returns the exit status. Raises UserError."""
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    # The port first: a port that is taken must not cost the time of loading a model.
    listener = bind(config.host, config.port)
    key = server_key(config.api_key)
    print(f"listening on {config.host}:{listener.getsockname()[1]}, loading {config.model}", flush=True)
    yield_idle_threads()
    if config.engine == "vllm":
        from outrider.server.vllm_engine.launcher import serve_vllm

        return serve_vllm(config, listener, key)
    # transformers, and torch with it, are imported only from here on: here, and where replicas come from.
    prepare()
    from outrider.server.text import load_text
    from outrider.server.torch_engine.engine import TorchEngine
    from outrider.server.torch_engine.loading import plan_engine

    text = load_text(config.model)
    plan = plan_engine(config, text.tokenizer)
    engine = TorchEngine(plan, seed=config.seed, key=key)
    app = ServerApp(engine, text, config.model)
    server = _Server(http_settings(app.asgi(key)), app, config, listener)
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()
    if server.problem is not None:
        raise server.problem
    return 1 if engine.failure() else 0


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the port. Raises UserError when it is taken or the address is not of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # Listening already here makes the next server that wants this port fail at once.
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"--port {port}: taken on {host} by another process (see `ss -ltnp 'sport = :{port}'`); "
                "stop it or choose another port"
            ) from error
        raise UserError(f"--host {host} --port {port}: cannot listen there: {error.strerror or error}") from error
    return listener


class _Server(uvicorn.Server):
    """uvicorn with our reading of signals: the first SIGTERM or SIGINT drains, a second one cuts off what is still
    running, so that partial completions are answered in order, and a third one ends at once."""

    def __init__(
        self, settings: uvicorn.Config, app: ServerApp, config: RolloutConfig, listener: socket.socket
    ) -> None:
        super().__init__(settings)
        self.app, self.rollout, self.listener = app, config, listener
        self._start: asyncio.Task[None] | None = None
        self._stop_task: asyncio.Task[None] | None = None
        self._signals = 0
        #: Why the server could not start.
        self.problem: UserError | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        yield

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().serve(sockets)
        finally:
            await self.app.engine.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._start = asyncio.get_running_loop().create_task(self.app.engine.start())
        try:
            await self._start
        except asyncio.CancelledError:  # it was told to stop
            self.should_exit = True
            return
        except (UserError, Unavailable) as error:
            self.problem = (
                error if isinstance(error, UserError) else UserError(f"--model {self.rollout.model}: {error}")
            )
            self.should_exit = True
            return
        finally:
            self._start = None
        await super().startup(sockets)
        search_less_often()
        host, port = self.listener.getsockname()[:2]
        print(ready_message(self.app.engine.info(), self.rollout, host, port), flush=True)

    def _on_signal(self) -> None:
        self._signals += 1
        if self._start is not None and not self._start.done():  # nobody is served yet
            if self._signals == 1:  # a second one would cut off what it ends
                self._start.cancel()
            return
        if self._signals > 2:
            self.force_exit = self.should_exit = True
            return
        timeout = self.rollout.drain_timeout if self._signals == 1 else 0.0
        log.info("draining for up to %g s: %d sequences running", timeout, self.app.engine.load().running)
        if self._stop_task is not None:
            self._stop_task.cancel()
        self._stop_task = asyncio.get_running_loop().create_task(self._drain(timeout))

    async def _drain(self, timeout: float) -> None:
        await self.app.drain(timeout)
        self.should_exit = True
