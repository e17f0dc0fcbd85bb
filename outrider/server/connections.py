"""Connections whose client does not get on with its request do not stay open for ever."""

import asyncio
from typing import Any, ClassVar, Literal

import msgspec
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from outrider.contract.errors import ErrorBody, ErrorDetail

#: Largest request line and headers, bytes.
MAX_HEAD = 64 * 2**10


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a deadline for whatever the client still owes.

    A request line with its headers must be complete ``head_deadline`` seconds after the connection was made, or after
    its first byte on a connection that is used again; between two parts of a body no more than ``body_deadline``
    seconds may pass. Who is late gets a 408, if anything has come at all, and the connection is closed. Idle
    connections that have been used are uvicorn's business (``timeout_keep_alive``).
    """

    head_deadline: ClassVar[float] = 30.0
    body_deadline: ClassVar[float] = 30.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._owed: Literal["nothing", "head", "body"] = "head"
        self._begins_here = False  # the head that is owed begins in the data being parsed
        self._head_bytes = 0  # of the head that is owed; 0 until it has begun
        self._timer: asyncio.TimerHandle | None = None
        self._set_timer(self.head_deadline)

    def data_received(self, data: bytes) -> None:
        self._begins_here = False
        super().data_received(data)
        if self._owed == "nothing" or self.transport.is_closing():
            self._clear_timer()
        elif self._owed == "head":
            self._await_head(len(data))
        elif not self.cycle.response_complete:  # a body that nobody reads any more has to end within the last deadline
            self._set_timer(self.body_deadline)

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._owed, self._begins_here, self._head_bytes = "head", True, 1

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._owed = "body"

    def on_message_complete(self) -> None:
        super().on_message_complete()
        # uvicorn has given up its own timer when more of the body came after the answer.
        self._owed = "head" if self.cycle.response_complete else "nothing"
        self._head_bytes = 0

    def send_400_response(self, msg: str) -> None:
        """In the shape of all other errors."""
        self._refuse(400, msg)

    def _await_head(self, received: int) -> None:
        if self._timer is None:
            self._set_timer(self.head_deadline)
        if self._head_bytes and not self._begins_here:
            self._head_bytes += received
        if self._head_bytes > MAX_HEAD:
            self._refuse(431, f"request line and headers are larger than the {MAX_HEAD} bytes that this server reads")

    def _late(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and (self._owed == "head" or self.flow.read_paused):
            # The client waits for an answer of ours, or we have not read what it sent.
            self._set_timer(self.head_deadline if self._owed == "head" else self.body_deadline)
        elif self._owed == "head" and self._head_bytes:
            self._refuse(408, f"the headers of the request are not complete after {self.head_deadline:g} s")
        elif self._owed == "body" and answering and not self.cycle.response_started:
            self._refuse(408, f"no more of the body has come for {self.body_deadline:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer in place of the application and close the connection."""
        body = msgspec.json.encode(ErrorBody(ErrorDetail(message=message)))
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def _set_timer(self, seconds: float) -> None:
        self._clear_timer()
        self._timer = self.loop.call_later(seconds, self._late)

    def _clear_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def protocol(head_deadline: float, body_deadline: float) -> type[PatientProtocol]:
    """A :class:`PatientProtocol` with other deadlines, in seconds."""
    settings: dict[str, Any] = {"head_deadline": head_deadline, "body_deadline": body_deadline}
    return type("PatientProtocol", (PatientProtocol,), settings)


def http_settings(app: ASGIApp) -> uvicorn.Config:
    """How a server of this project serves ``app``."""
    return uvicorn.Config(
        app,
        http=PatientProtocol,
        # Whatever else is installed: the key and the deadlines are those of plain HTTP.
        ws="none",
        loop="uvloop",
        lifespan="off",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=120,
    )
