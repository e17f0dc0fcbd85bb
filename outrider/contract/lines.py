"""Small messages over a plain TCP connection: structures in JSON, one a line."""

import errno
import socket
from typing import TypeVar

import msgspec

#: Bytes of the longest message, and seconds that one which has begun may take to end.
LONGEST = 16384
PATIENCE = 3.0

Message = TypeVar("Message")


def send(connection: socket.socket, message: msgspec.Struct) -> None:
    """Hand a message to the system. Raises OSError."""
    connection.sendall(msgspec.json.encode(message) + b"\n")


def receive(connection: socket.socket, kind: type[Message]) -> list[Message]:
    """What has come, one message at least. Raises OSError when the other side has left or breaks off, and
    MsgspecError when it speaks otherwise."""
    connection.settimeout(PATIENCE)
    data = b""
    while not data.endswith(b"\n") and len(data) < LONGEST:
        more = connection.recv(LONGEST)
        if not more:
            raise ConnectionResetError(errno.ECONNRESET, "it closed the connection")
        data += more
    decode = msgspec.json.Decoder(kind).decode
    return [decode(line) for line in data.splitlines()]
