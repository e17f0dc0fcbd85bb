"""Whether a server can fetch weights from a trainer's node, found out before there are any."""

import json
from collections.abc import AsyncIterator

import msgspec
import pytest

from outrider.contract import routes
from outrider.contract.control import ReachAnswer
from outrider.weights.segment_server import SegmentServer
from tests.contract.client import Client


async def asked(client: Client, url: str) -> tuple[int, bytes]:
    return await client.ask("POST", routes.REACH, json.dumps({"url": url, "run_id": "a-run"}).encode())


async def problem(client: Client, url: str) -> str | None:
    status, body = await asked(client, url)
    assert status == 200, body
    return msgspec.json.decode(body, type=ReachAnswer).problem


@pytest.fixture
async def nodes(key: str) -> AsyncIterator[dict[str, str]]:
    servers = {
        "good": SegmentServer("127.0.0.1", key, "a-run"),
        "another run": SegmentServer("127.0.0.1", key, "another-run"),
        "another key": SegmentServer("127.0.0.1", "another key", "a-run"),
    }
    yield {name: await server.start() for name, server in servers.items()}
    for server in servers.values():
        await server.stop()


async def test_what_is_found(client: Client, nodes: dict[str, str]) -> None:
    assert await problem(client, nodes["good"]) is None
    assert await problem(client, nodes["another run"]) == "something else answers there"
    assert await problem(client, nodes["another key"]) == "the API key of the trainer is not the server's"
    assert "refused" in str(await problem(client, "http://127.0.0.1:1/outrider/segments"))


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "http://127.0.0.1:1/latest/meta-data", "http://127.0.0.1:1/outrider/segments?q=1",
     "http://a@127.0.0.1:1/outrider/segments", "https://127.0.0.1:1/outrider/segments", "nonsense", ""],
)  # fmt: skip
async def test_nothing_else_is_fetched(client: Client, url: str) -> None:
    status, body = await asked(client, url)
    assert status == 400
    assert b"is not where a trainer's node serves weights" in body
