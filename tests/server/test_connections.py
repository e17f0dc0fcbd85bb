"""Clients that owe something and do not come up with it lose their connection; nobody else does."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from outrider.contract.errors import ErrorBody
from outrider.server.connections import MAX_HEAD, protocol

#: Seconds that clients are given here, and in which even a busy machine closes a connection.
DEADLINE, PATIENCE = 0.3, 20.0

REQUEST = b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n%b"

Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers the length of the body; ``/late`` after a while, ``/early`` before it has read it."""
    size, more = 0, scope["path"] != "/early"
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    if scope["path"] == "/late":
        await asyncio.sleep(3 * DEADLINE)
    body = b"%d bytes" % size
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def serving(head: float = DEADLINE, body: float = DEADLINE) -> AsyncIterator[Connect]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings = uvicorn.Config(echo, http=protocol(head, body), ws="none", lifespan="off", log_level="critical")
        server = uvicorn.Server(settings)
        task = asyncio.create_task(server._serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        port = listener.getsockname()[1]
        try:
            yield lambda: asyncio.open_connection("127.0.0.1", port)
        finally:
            server.should_exit = True
            await task


async def last_words(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the connection is closed."""
    async with asyncio.timeout(PATIENCE):
        return await reader.read()


def refusal(answer: bytes) -> tuple[int, str]:
    head, body = answer.split(b"\r\n\r\n", 1)
    assert b"connection: close" in head
    return int(head.split()[1]), msgspec.json.decode(body, type=ErrorBody).error.message


async def test_a_connection_on_which_nothing_comes_is_closed() -> None:
    async with serving() as connect:
        reader, _ = await connect()
        assert await last_words(reader) == b""


@pytest.mark.parametrize("used", [False, True])
async def test_headers_that_do_not_come_to_an_end(used: bool) -> None:
    """Byte by byte they may come; in the end it was too long. On a connection that was used before, too."""
    async with serving() as connect:
        reader, writer = await connect()
        if used:
            writer.write(REQUEST % (5, b"hello"))
            assert b"200 OK" in await reader.readuntil(b"5 bytes")
        started = time.monotonic()
        writer.write(b"POST / HTTP/1.1\r\n")
        while not reader._buffer:  # type: ignore[attr-defined]
            writer.write(b"x: y\r\n")
            await asyncio.sleep(DEADLINE / 10)
            assert time.monotonic() < started + PATIENCE
        status, message = refusal(await last_words(reader))
        assert (status, message) == (408, f"the headers of the request are not complete after {DEADLINE} s")


async def test_a_body_that_stops_coming() -> None:
    async with serving() as connect:
        reader, writer = await connect()
        writer.write(REQUEST % (100, b"hello"))
        status, message = refusal(await last_words(reader))
        assert (status, message) == (408, f"no more of the body has come for {DEADLINE} s")


async def test_a_slow_body_is_waited_for() -> None:
    """As long as some of it comes, and as long as it takes."""
    async with serving(body=1.0) as connect:
        reader, writer = await connect()
        writer.write(REQUEST % (30, b""))
        for _ in range(15):
            writer.write(b"ab")
            await asyncio.sleep(0.1)
        assert b"200 OK" in await reader.readuntil(b"30 bytes")


async def test_an_answer_may_take_as_long_as_it_takes() -> None:
    """The client owes nothing while it waits, even if it has begun with its next request, or has sent it."""
    late = (REQUEST % (5, b"hello")).replace(b"/", b"/late", 1)
    for more in (b"", b"POST ", REQUEST % (3, b"abc")):
        async with serving() as connect:
            reader, writer = await connect()
            writer.write(late + more)
            assert b"200 OK" in await reader.readuntil(b"5 bytes")
            if len(more) > 5:
                assert b"200 OK" in await reader.readuntil(b"3 bytes")


async def test_a_body_that_was_not_read_has_to_end() -> None:
    early = (REQUEST % (10**6, b"hello")).replace(b"/", b"/early", 1)
    async with serving() as connect:
        reader, writer = await connect()
        writer.write(early)
        assert b"200 OK" in await reader.readuntil(b"0 bytes")
        for _ in range(1000):
            writer.write(b"drop by drop")
            await asyncio.sleep(DEADLINE / 10)
            if reader.at_eof():
                break
        assert reader.at_eof()


async def test_after_a_body_that_was_not_read_the_connection_goes_on() -> None:
    """And is closed when it does not."""
    early = (REQUEST % (10, b"hello")).replace(b"/", b"/early", 1)
    async with serving() as connect:
        reader, writer = await connect()
        writer.write(early)
        assert b"200 OK" in await reader.readuntil(b"0 bytes")
        writer.write(b"world" + REQUEST % (3, b"abc"))
        assert b"200 OK" in await reader.readuntil(b"3 bytes")
        writer.write(early)
        await reader.readuntil(b"0 bytes")
        writer.write(b"world")
        assert await last_words(reader) == b""


async def test_headers_without_end_are_refused() -> None:
    async with serving(head=PATIENCE) as connect:
        reader, writer = await connect()
        writer.write(b"GET / HTTP/1.1\r\nx: ")
        while not reader._buffer:  # type: ignore[attr-defined]
            writer.write(b"y" * (MAX_HEAD // 8))
            await asyncio.sleep(0.1)
        assert refusal(await last_words(reader)) == (
            431, f"request line and headers are larger than the {MAX_HEAD} bytes that this server reads",
        )  # fmt: skip


async def test_a_body_larger_than_headers_may_be_followed_by_a_request() -> None:
    async with serving(head=PATIENCE) as connect:
        reader, writer = await connect()
        writer.write(REQUEST % (4 * MAX_HEAD, b"x" * 4 * MAX_HEAD) + b"POST / HTTP/1.1\r\n")
        assert b"200 OK" in await reader.readuntil(b"%d bytes" % (4 * MAX_HEAD))
        writer.write(b"content-length: 2\r\n\r\nab")
        assert b"200 OK" in await reader.readuntil(b"2 bytes")


async def test_what_is_no_http_is_refused_in_the_shape_of_all_errors() -> None:
    async with serving() as connect:
        reader, writer = await connect()
        writer.write(b"hello\r\n\r\n")
        assert refusal(await last_words(reader)) == (400, "Invalid HTTP request received.")
