"""Serves this host's published segments to rollout servers on other hosts, by byte range."""

import asyncio
import hmac
import ipaddress
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
        self._key, self._run_id, self._prefix = f"Bearer {key}", run_id, f"outrider-{run_id}-"
        self._host = host
        self._runner: web.AppRunner | None = None

    async def start(self) -> str:
        """Listen on a free port; returns the URL that a segment's name is appended to."""
        app = web.Application()
        app.router.add_get(routes.WEIGHT_SEGMENT, self._segment)
        app.router.add_get(routes.WEIGHT_SEGMENTS, self._who)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, 0)
        await site.start()
        port = self._runner.addresses[0][1]
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{port}{routes.WEIGHT_SEGMENTS}"

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _segment(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if not self._bears_key(request):
            return web.Response(status=401, text="the API key is missing or wrong")
        path = segment_directory() / name
        # Segments of this run only, and no way out of the directory.
        if not name.startswith(self._prefix) or "/" in name or not path.is_file():
            return web.Response(status=404, text=f"no segment {name}")
        return web.FileResponse(path)

    async def _who(self, request: web.Request) -> web.StreamResponse:
        """For which run this is: what a server asks to find out whether it gets here."""
        if not self._bears_key(request):
            return web.Response(status=401, text="the API key is missing or wrong")
        return web.Response(text=self._run_id)

    def _bears_key(self, request: web.Request) -> bool:
        return hmac.compare_digest(request.headers.get("Authorization", "").encode(), self._key.encode())


def own_address(server_url: str) -> str:
    """The address of this host as a server sees it: the one from which it would be reached."""
    return address_towards(urlsplit(server_url).hostname or "127.0.0.1")


def address_towards(host: str) -> str:
    """The address of this host from which ``host`` would be reached. Raises OSError when there is no way there."""
    family = socket.getaddrinfo(host, 80, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 80))  # sends nothing: it only chooses a route
        return str(probe.getsockname()[0])


def outward_address(*hosts: str) -> str:
    """The address of this host for servers that are not on it: from which the first of ``hosts`` is reached by way of
    the network; the names of the first may mean nothing here, or this host itself (127.0.1.1). Else that of the default
    route, and where there is none, what routing says. Raises OSError where nothing can be said."""
    found, problem = [], OSError("no host was given")
    for host in [*hosts, _ELSEWHERE]:
        try:
            found.append(address_towards(host))
        except OSError as error:
            problem = error
            continue
        if not ipaddress.ip_address(found[-1].partition("%")[0]).is_loopback:
            return found[-1]
    if not found:
        raise problem
    return found[0]


def means_this_host(host: str) -> bool:
    """Whether it says so, as ``localhost`` or 127.0.0.1; a name that is translated to that may mean another address to
    others."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


#: An address that nobody has (RFC 5737), and that lies beyond the default route.
_ELSEWHERE = "192.0.2.1"


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
