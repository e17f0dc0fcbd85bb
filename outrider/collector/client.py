"""One server, seen from the collector. Requests about weights have connections of their own."""

import os
import re
from typing import TypeVar

import aiohttp
import msgspec

from outrider.collector.answers import ACCEPT, read_answer
from outrider.contract import routes
from outrider.contract.control import (
    CommitRequest,
    Inflight,
    ReachAnswer,
    ReachRequest,
    ServerInfo,
    StageRequest,
    WeightStatus,
)
from outrider.contract.generation import CompletionRequest
from outrider.contract.manifest import Manifest
from outrider.environments.base import Completion

#: Gauges of vLLM and of the torch engine, one line for each engine behind the port.
_REQUESTS = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{.*\})? ([\d.e+]+)", re.MULTILINE)

Answer = TypeVar("Answer", bound=msgspec.Struct)

#: Deadlines of control requests, seconds. A stage moves a whole model, and a commit may wait for what is in flight.
INFO_TIMEOUT = 5.0
REACH_TIMEOUT = 30.0
STAGE_TIMEOUT = 600.0
COMMIT_TIMEOUT: dict[Inflight, float] = {"keep": 60.0, "recompute": 60.0, "wait": 3600.0}


class _Error(msgspec.Struct):
    message: str


class _ErrorBody(msgspec.Struct):
    """The part of an error that is needed here: other servers fill the rest with what they like."""

    error: _Error


class ServerLost(Exception):
    """The server did not answer: refused, reset, or beyond the deadline."""


class Refused(Exception):
    """The server answered with an error. ``retryable``: another server, or this one later, may do better."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status, self.message = status, message
        self.retryable = status in (409, 429) or status >= 500


class ServerClient:
    """Speaks the server contract. A completion has no deadline of its own, since a long rollout is not a dead
    server: its connection is dropped by :meth:`drop_requests` when probes say that the server is gone."""

    #: What is asked to find out whether somebody is there.
    probed = routes.INFO
    #: Whether a connection serves one request after another.
    keeps_connections = True

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._encode = msgspec.json.Encoder().encode
        self._completions = self.url + routes.COMPLETIONS
        self._data = self._session(limit=0)
        self._control = self._session(limit=4)

    def _session(self, limit: int) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=limit, keepalive_timeout=60.0)
            if self.keeps_connections
            else aiohttp.TCPConnector(limit=limit, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10.0),
            headers={**self._headers, "Content-Type": "application/json"},
        )

    async def complete(self, request: CompletionRequest, run_id: str) -> list[Completion]:
        """Ask for completions sampled from the weights of ``run_id``. Raises ServerLost, Refused or BadAnswer."""
        headers = {routes.RUN_HEADER: run_id, "Accept": ACCEPT}
        return await self._completed(self._encode(request), headers, None)

    async def _completed(self, body: bytes, headers: dict[str, str], version: int | None) -> list[Completion]:
        """The completions that the server answers. version: see ``read_answer``."""
        try:
            async with self._data.post(self._completions, data=body, headers=headers) as answer:
                content = await answer.read()
                if answer.status == 200:
                    return read_answer(content, answer.headers.get("Content-Type", ""), self.url, version)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise ServerLost(f"{self.url}: {_reason(error)}") from error
        except msgspec.MsgspecError as error:
            raise Refused(502, f"{self.url} answered what is not a completion: {error}") from error
        raise Refused(answer.status, _message(content))

    async def health(self) -> None:
        """Whether its engine works. Raises ServerLost or Refused."""
        await self._bytes("GET", routes.HEALTH, None, INFO_TIMEOUT)

    async def info(self) -> ServerInfo:
        """Who the server is. Raises ServerLost or Refused."""
        return await self._ask("GET", routes.INFO, None, ServerInfo, INFO_TIMEOUT)

    async def status(self) -> WeightStatus:
        """The state of its weights. Raises ServerLost or Refused."""
        return await self._ask("GET", routes.STATUS, None, WeightStatus, INFO_TIMEOUT)

    async def reach(self, url: str, run_id: str) -> str | None:
        """Why weights of ``run_id`` could not be fetched from a node at ``url``. Raises ServerLost or Refused."""
        body = ReachRequest(url=url, run_id=run_id)
        return (await self._ask("POST", routes.REACH, body, ReachAnswer, REACH_TIMEOUT)).problem

    async def stage(self, manifest: Manifest) -> WeightStatus:
        """Have a version fetched. Raises ServerLost or Refused."""
        return await self._ask("POST", routes.STAGE, StageRequest(manifest=manifest), WeightStatus, STAGE_TIMEOUT)

    async def commit(self, run_id: str, version: int, inflight: Inflight = "keep") -> WeightStatus:
        """Have the staged version put to use. inflight: what becomes of requests in flight. Raises ServerLost or
        Refused."""
        body = CommitRequest(run_id=run_id, version=version, inflight=inflight)
        return await self._ask("POST", routes.COMMIT, body, WeightStatus, COMMIT_TIMEOUT[inflight])

    async def requests(self) -> float | None:
        """Requests that the server runs or lets wait, by its metrics; None where these do not tell. Raises ServerLost
        or Refused."""
        text = (await self._bytes("GET", routes.METRICS, None, INFO_TIMEOUT)).decode(errors="replace")
        found = _REQUESTS.findall(text)
        return sum(map(float, found)) if found else None

    async def drop_requests(self) -> None:
        """Break the connections of all completions in flight; each of them raises ServerLost."""
        old, self._data = self._data, self._session(limit=0)
        await old.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._data.close()
        await self._control.close()

    async def _ask(
        self, verb: str, path: str, body: msgspec.Struct | None, kind: type[Answer], timeout: float
    ) -> Answer:
        content = await self._bytes(verb, path, None if body is None else self._encode(body), timeout)
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.MsgspecError as error:
            raise Refused(502, f"{self.url}{path} answered what is not {kind.__name__}: {error}") from error

    async def _bytes(self, verb: str, path: str, data: bytes | None, timeout: float) -> bytes:
        try:
            async with self._control.request(
                verb, self.url + path, data=data, timeout=aiohttp.ClientTimeout(total=timeout)
            ) as answer:
                content = await answer.read()
        except TimeoutError as error:
            raise ServerLost(f"{self.url}{path}: no answer within {timeout:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerLost(f"{self.url}: {_reason(error)}") from error
        if answer.status != 200:
            raise Refused(answer.status, _message(content))
        return content


def _reason(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.os_error.errno or 0
        # Event loops word it differently; negative numbers are those of name resolution.
        return os.strerror(number) if number > 0 else error.os_error.strerror or str(error.os_error)
    return str(error) or type(error).__name__


def _message(body: bytes) -> str:
    """The message of an error in OpenAI's shape, else the beginning of the body."""
    try:
        return msgspec.json.decode(body, type=_ErrorBody).error.message
    except msgspec.MsgspecError:
        return body[:200].decode(errors="replace").strip() or "no explanation"
