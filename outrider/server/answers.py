"""Answers in OpenAI's shapes, and what becomes of the errors that a handler raises."""

import logging
from collections.abc import Awaitable, Callable

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from outrider.contract.errors import ErrorBody, ErrorDetail
from outrider.server.engine import Conflict, InvalidRequest, Unavailable

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]

_encode = msgspec.json.Encoder().encode


class TooLarge(Exception):
    """The body is larger than this server reads; answered with status 413."""


#: Status and OpenAI error type of what engines and handlers raise.
_STATUSES: dict[type[Exception], tuple[int, str]] = {
    InvalidRequest: (400, "invalid_request_error"),
    Conflict: (409, "conflict_error"),
    TooLarge: (413, "invalid_request_error"),
    Unavailable: (503, "server_error"),
}


def json_answer(value: msgspec.Struct, status: int = 200) -> Response:
    """``value`` as JSON."""
    return Response(_encode(value), status, media_type="application/json")


def error_answer(status: int, detail: ErrorDetail) -> Response:
    """An error."""
    return json_answer(ErrorBody(detail), status)


def explain(error: Exception, path: str) -> tuple[int, ErrorDetail]:
    """Status and body for what a handler of ``path`` raised. What nobody foresaw is logged."""
    for kind, (status, name) in _STATUSES.items():
        if isinstance(error, kind):
            return status, ErrorDetail(message=str(error), type=name, param=getattr(error, "param", None))
    log.error("%s failed", path, exc_info=error)
    return 500, ErrorDetail(message=f"{type(error).__name__}: {error}", type="server_error")


def answering(handler: Handler) -> Handler:
    """``handler``, with an answer for everything that it raises."""

    async def route(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:  # noqa: BLE001 - the client must hear what went wrong, not a closed connection
            return error_answer(*explain(error, request.url.path))

    return route
