"""Whether the ranks on other nodes are still there, also while nobody has anything to say to them.

Each rank holds a connection to rank 0 on which nothing travels but the kernel's own keepalive probes. So a process that
dies is noticed at once, since its kernel closes the connection; a host that vanishes when it has answered no probe for
``silence`` seconds; and a process that computes for minutes without letting Python's other threads run is no loss. Rank
0 tells the others whom it has lost, and all end.
"""

import contextlib
import errno
import hmac
import ipaddress
import secrets
import selectors
import socket
import threading
from collections.abc import Callable

import msgspec

from outrider.contract.errors import UserError
from outrider.contract.lifetime import end_now
from outrider.contract.lines import receive, send
from outrider.contract.output import say
from outrider.weights.segment_server import means_this_host

#: Seconds to connect to rank 0.
CONNECT = 30.0
#: Seconds for this process to end by itself, where another one has: often both have the same reason, and say it better.
GRACE = 2.0
#: What the kernel says of a connection whose other end does not answer.
_SILENT = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)


class Hello(msgspec.Struct, tag="hello"):
    """Who connects. token: what rank 0 has left in the store, for ranks of this run alone. host: its name."""

    token: str
    rank: int
    node: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} on node {self.node} ({self.host})"


class Bye(msgspec.Struct, tag="bye"):
    """The sender ends as it should."""


class Failed(msgspec.Struct, tag="failed"):
    """The sender ends because of an error."""

    reason: str


class Stop(msgspec.Struct, tag="stop"):
    """To rank 0: the user, or whoever manages the cluster, wants the run to end, and has said so here."""


class Lost(msgspec.Struct, tag="lost"):
    """From rank 0: somebody is gone."""

    text: str


Message = Hello | Bye | Failed | Stop | Lost


class Heartbeat:
    """One rank's side, with a thread of its own. ``last_words``: called before it ends this process. ``stop``: called
    on rank 0 when another one is to stop."""

    def __init__(self, me: Hello, silence: float) -> None:
        """silence: seconds."""
        self.last_words: Callable[[], None] = lambda: None
        self.stop: Callable[[], None] = lambda: None
        self._me, self._silence = me, silence
        self._peers: dict[socket.socket, Hello] = {}
        self._left = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def listen(self, address: str) -> int:
        """On rank 0. address: under which the others reach it. Returns the port."""
        family, _, _, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            # A host's own name often is 127.0.1.1 there, and its address elsewhere.
            own_name = ipaddress.ip_address(place[0]).is_loopback and not means_this_host(address)
            self._listener.bind(("", 0) if own_name else place)
        except OSError:  # it is translated on the way here
            self._listener.bind(("", 0))
        self._listener.listen(128)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread.start()
        return int(self._listener.getsockname()[1])

    def connect(self, address: str, port: int) -> None:
        """On every other rank. Raises UserError."""
        try:
            connection = socket.create_connection((address, port), CONNECT)
            self._keep_alive(connection)
            send(connection, self._me)
        except OSError as error:
            raise UserError(
                f"{self._me} cannot reach rank 0 at {address}:{port} ({error.strerror or error}): the nodes need all "
                "ports between them"
            ) from error
        self._take(connection, Hello("", 0, 0, address))
        self._thread.start()

    def leave(self, reason: str | None = None) -> None:
        """This process ends, which is no loss; or is for this ``reason``."""
        if not self._left.is_set():
            self._left.set()
            self._tell(Bye() if reason is None else Failed(reason))

    def ask_to_stop(self) -> None:
        """Ask rank 0 to end the run in order."""
        self._tell(Stop())

    def wait(self, timeout: float) -> None:
        """Until the thread has ended this process, if it is about to. timeout: seconds."""
        self._thread.join(timeout)

    def _keep_alive(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        probe = max(1, int(self._silence) // 5)
        options = {
            "TCP_KEEPIDLE": probe, "TCP_KEEPINTVL": probe, "TCP_KEEPCNT": 4,
            # What was sent and not acknowledged, in milliseconds.
            "TCP_USER_TIMEOUT": int(self._silence * 1000),
        }  # fmt: skip
        for name, value in options.items():
            if hasattr(socket, name):  # not all systems have all of them
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def _take(self, connection: socket.socket, peer: Hello) -> None:
        self._peers[connection] = peer
        self._selector.register(connection, selectors.EVENT_READ)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._peers.pop(connection)
        connection.close()

    def _tell(self, message: Message) -> None:
        for connection in list(self._peers):
            with contextlib.suppress(OSError):  # it is gone as well
                send(connection, message)

    def _watch(self) -> None:
        while not self._left.is_set():
            for key, _ in self._selector.select(0.5):
                if key.fileobj is self._listener:
                    self._accept(self._listener.accept()[0])
                elif isinstance(key.fileobj, socket.socket):
                    self._hear(key.fileobj)

    def _accept(self, connection: socket.socket) -> None:
        try:
            [hello] = receive(connection, Hello)
            if not hmac.compare_digest(hello.token.encode(), self._me.token.encode()):
                raise ValueError
            self._keep_alive(connection)
        except (OSError, ValueError):  # no rank of this run
            connection.close()
            return
        self._take(connection, hello)

    def _hear(self, connection: socket.socket) -> None:
        peer = self._peers[connection]
        try:
            messages: list[Message] = receive(connection, Message)  # type: ignore[arg-type]
        except OSError as error:
            self._drop(connection)
            if error.errno in _SILENT:
                self._end(f"{peer} has not been heard for {self._silence:g} s", 0.0)
            else:
                self._end(f"{peer} is gone", GRACE)
            return
        for message in messages:
            match message:
                case Bye():
                    self._drop(connection)
                    return
                case Failed(reason=reason):
                    self._end(f"{peer} has ended: {reason}", GRACE)
                case Stop():
                    self.stop()
                case Lost(text=text):
                    self._end(text, GRACE)

    def _end(self, text: str, grace: float) -> None:
        """Tell the others, and end this process unless it leaves by itself."""
        if self._me.rank == 0:
            self._tell(Lost(text))
        if self._left.wait(grace):
            return
        why = f"outrider: rank {self._me.rank} on node {self._me.node} ends: {text}"

        def words() -> None:
            say(f"{why}; go on with --resume_from_checkpoint auto")
            self.last_words()

        end_now(words, 1)


def new_token() -> str:
    """Something that only ranks of this run know."""
    return secrets.token_hex(16)
