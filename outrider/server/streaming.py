"""Answers as server-sent events, in the way of OpenAI's API."""

from collections.abc import AsyncIterator, Callable

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from outrider.contract.errors import ErrorBody
from outrider.contract.generation import SamplingFields
from outrider.server.answers import error_answer, explain
from outrider.server.presence import while_connected

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # reverse proxies hand events on as they come
]
_END = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


def wants_usage(body: SamplingFields) -> bool:
    """Whether the stream ends with the token counts."""
    return body.stream_options is not None and body.stream_options.include_usage


class EventStream(Response):
    """Sends each of ``events`` as it comes. An error before the first of them is an ordinary answer; one that comes
    later is an event, and the last one."""

    def __init__(self, events: AsyncIterator[msgspec.Struct], close: Callable[[], None]) -> None:
        """close: called when nothing more is read from ``events``, at once when the client goes away."""
        super().__init__()
        self.events, self.close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        try:
            async with while_connected(receive):
                async for event in self.events:
                    if not begun:
                        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                        begun = True
                    await _send(send, b"data: " + _encode(event) + b"\n\n")
            last = _END
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001 - the client must hear what went wrong, not a broken stream
            status, detail = explain(error, scope["path"])
            if not begun:
                await error_answer(status, detail)(scope, receive, send)
                return
            last = b"data: " + _encode(ErrorBody(detail)) + b"\n\n"
        finally:
            self.close()
        await _send(send, last, more=False)


async def _send(send: Send, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
