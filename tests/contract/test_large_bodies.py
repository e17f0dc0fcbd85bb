"""Bodies that are too large, or as large as may be, and clients that stop in the middle."""

import asyncio
import json
import time
from collections.abc import AsyncIterator

import aiohttp
import msgspec
import pytest

from outrider.contract import routes
from outrider.contract.errors import ErrorBody
from tests.contract.client import PATIENCE, Client
from tests.contract.servers import Server

LIMIT = 32 * 2**20
#: Ten megabytes each, one worse than the other.
JUNK: dict[str, bytes] = {
    "no JSON": b"x" * 10**7,
    "zeros": bytes(10**7),
    "one text": json.dumps({"prompt": "x" * 10**7}).encode(),
    "words": json.dumps({"prompt": "the cat " * 1_250_000}).encode(),
    "tokens": b'{"prompt": [' + b"5," * 5_000_000 + b"5]}",
    "objects": b'{"messages": [' + b"{}," * 3_300_000 + b"{}]}",
    "one message": json.dumps({"messages": [{"role": "user", "content": "x" * 10**7}]}).encode(),
    "an unknown field": json.dumps({"prompt": "x", "more": "x" * 10**7}).encode(),
}


@pytest.mark.parametrize("path", [routes.COMPLETIONS, routes.CHAT, routes.STAGE])
async def test_a_body_that_is_too_large(client: Client, path: str) -> None:
    status, error = await client.refusal(b'{"prompt": [5]}' + b" " * LIMIT, path)
    assert (status, error.type) == (413, "invalid_request_error")
    assert "32 MiB" in error.message


async def test_a_body_that_is_too_large_in_pieces(client: Client) -> None:
    """Nobody said how large it would be."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 2**20

    async with client.session.post(routes.COMPLETIONS, data=pieces()) as answer:
        assert answer.status == 413


async def test_the_largest_body(client: Client) -> None:
    body = b'{"prompt": [5], "max_tokens": 1}'
    status, answer = await client.ask("POST", routes.COMPLETIONS, body + b" " * (LIMIT - len(body)))
    assert status == 200, answer


@pytest.mark.parametrize("name", JUNK)
async def test_ten_megabytes_of_junk_hold_nobody_up(client: Client, name: str) -> None:
    """While they come, others get their answers, as many as before."""
    path = routes.CHAT if b'"messages"' in JUNK[name][:20] else routes.COMPLETIONS
    refusals = [asyncio.create_task(client.refusal(JUNK[name], path)) for _ in range(3)]
    answered = 0
    while not all(task.done() for task in refusals):
        assert len(await client.greedy([5, 6], 2)) == 2
        answered += 1
    assert answered
    for status, error in await asyncio.gather(*refusals):
        assert status == 400
        assert error.message
        assert len(error.message) < 1000


async def _raw(server: Server, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(data)
    return reader, writer


async def test_clients_that_stop_in_the_middle_lose_their_connection(server: Server, key: str, client: Client) -> None:
    """After half a minute: those that send nothing, half of their headers, or half of a body. Others do not."""
    begun = b"POST /v1/completions HTTP/1.1\r\nhost: h\r\nauthorization: Bearer " + key.encode()
    started = time.monotonic()
    clients = [await _raw(server, sent) for sent in (b"", begun, begun + b'\r\ncontent-length: 50\r\n\r\n{"prompt"')]
    async with asyncio.timeout(PATIENCE):
        last_words = await asyncio.gather(*(reader.read() for reader, _ in clients))
    assert time.monotonic() - started > 25
    assert last_words[0] == b""
    for answer in last_words[1:]:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert "30 s" in msgspec.json.decode(body, type=ErrorBody).error.message
    assert (await client.ask("GET", routes.HEALTH))[0] == 200


async def test_a_body_that_breaks_off(server: Server, key: str, client: Client) -> None:
    _, writer = await _raw(
        server,
        b"POST /v1/completions HTTP/1.1\r\nauthorization: Bearer " + key.encode() + b"\r\ncontent-length: 9\r\n\r\n{",
    )
    await writer.drain()
    writer.transport.abort()
    assert (await client.ask("GET", routes.HEALTH))[0] == 200
    assert "Traceback" not in server.output.read_text()


async def test_a_stranger_does_not_get_to_send_a_body(server: Server) -> None:
    """The key is asked for first."""
    async with Client(server.url, None) as stranger:
        try:
            status, _ = await stranger.ask("POST", routes.COMPLETIONS, b" " * 2 * LIMIT)
        except aiohttp.ClientError:
            return  # the connection is closed before all is sent
        assert status == 401
