"""Serves this host's published segments to rollout servers on other hosts, by byte range."""

import asyncio
import hmac
import socket
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

from aiohttp import web

from outrider.contract import routes
from outrider.weights.segments import segment_directory

#: Seconds to begin, or to stop, to listen.
START_DEADLINE = 30.0


class SegmentServer:
    """A small HTTP server for the files of one run in the segment directory."""

    def __init__(self, host: str, key: str, run_id: str) -> None:
        self._key, self._prefix = f"Bearer {key}", f"outrider-{run_id}-"
        self._host = host
        self._runner: web.AppRunner | None = None

    async def start(self) -> str:
        """Listen on a free port; returns the URL that a segment's name is appended to."""
        app = web.Application()
        app.router.add_get(routes.WEIGHT_SEGMENT, self._segment)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, 0)
        await site.start()
        port = self._runner.addresses[0][1]
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{port}" + routes.WEIGHT_SEGMENT.format(name="").rstrip("/")

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _segment(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if not hmac.compare_digest(request.headers.get("Authorization", "").encode(), self._key.encode()):
            return web.Response(status=401, text="the API key is missing or wrong")
        path = segment_directory() / name
        # Segments of this run only, and no way out of the directory.
        if not name.startswith(self._prefix) or "/" in name or not path.is_file():
            return web.Response(status=404, text=f"no segment {name}")
        return web.FileResponse(path)


def own_address(server_url: str) -> str:
    """The address of this host as a server sees it: the one from which it would be reached."""
    return address_towards(urlsplit(server_url).hostname or "127.0.0.1")


def address_towards(host: str) -> str:
    """The address of this host from which ``host`` would be reached. Raises OSError when there is no way there."""
    family = socket.getaddrinfo(host, 80, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 80))  # sends nothing: it only chooses a route
        return str(probe.getsockname()[0])


def serve_in_thread(host: str, key: str, run_id: str) -> tuple[str, Callable[[], None]]:
    """A server for a process that has no event loop: its URL, and what stops it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="segments", daemon=True)
    thread.start()
    server = SegmentServer(host, key, run_id)
    url = asyncio.run_coroutine_threadsafe(server.start(), loop).result(START_DEADLINE)

    def stop() -> None:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(START_DEADLINE)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(START_DEADLINE)

    return url, stop
