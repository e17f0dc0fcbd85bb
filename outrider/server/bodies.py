"""Bodies of requests: read within bounds, decoded into what a route expects."""

import functools
from typing import TypeVar

import msgspec
from starlette.requests import Request

from outrider.server.answers import TooLarge
from outrider.server.complaints import complaint
from outrider.server.engine import InvalidRequest

#: Largest body that is read, bytes.
MAX_BODY = 32 * 2**20

#: Bodies from this size on are looked at before they are decoded, bytes.
LARGE_BODY = 2**20

#: Commas and braces in a body. They are counted at memory speed, while decoding as many values as fit into the largest
#: body would keep everybody waiting for a second. No context holds a text of so many.
MAX_MARKS = 1_000_000

Body = TypeVar("Body", bound=msgspec.Struct)


async def read_body(request: Request, kind: type[Body]) -> Body:
    """The body as a ``kind``. Raises InvalidRequest naming field, allowed range and what was found; TooLarge."""
    return decode_body(await _read(request), kind)


async def _read(request: Request) -> bytearray:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > MAX_BODY:
        raise TooLarge(f"the body has {announced} bytes; this server reads up to {MAX_BODY // 2**20} MiB")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise TooLarge(f"the body is larger than the {MAX_BODY // 2**20} MiB that this server reads")
    return data


def decode_body(data: bytes | bytearray, kind: type[Body]) -> Body:
    """JSON as a ``kind``. Raises InvalidRequest naming field, allowed range and what was found."""
    if len(data) > LARGE_BODY and (marks := sum(map(data.count, (b",", b"{", b"[")))) > MAX_MARKS:
        raise InvalidRequest(f"the body has {marks} commas and brackets; this server reads up to {MAX_MARKS}")
    try:
        try:
            return _decoder(kind).decode(data)
        except msgspec.ValidationError as error:
            raise complaint(error, data, kind) from error  # or what is wrong behind the field at fault
    except RecursionError as error:
        raise InvalidRequest("the body nests lists and objects too deeply") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON in UTF-8: {error}") from error


@functools.cache
def _decoder(kind: type[Body]) -> msgspec.json.Decoder[Body]:
    return msgspec.json.Decoder(kind)
