"""The nodes of a run meet before anything is started on them: who is missing, or does not belong here, is named.

Node 0 listens at MASTER_ADDR:MASTER_PORT, where torch's store will be afterwards. Every node, itself included, comes
there with its number and what it was told, keeps its connection, and hears "go" on it when all are there. One that
leaves before may come again.
"""

import contextlib
import select
import socket
import sys
import time

import msgspec

from outrider.cli.placement import Placement
from outrider.contract.errors import UserError
from outrider.contract.lines import receive, send

#: Seconds for all nodes to come, those after which one says that it waits, and those between two attempts.
DEADLINE = 600.0
PATIENCE = 15.0
AGAIN = 0.5


class Arrival(msgspec.Struct, tag="outrider node"):
    """What a node says of itself. host: its name, for people."""

    node: int
    nodes: int
    processes: int
    host: str


class Answer(msgspec.Struct, tag="outrider muster"):
    """What it hears. missing: nodes that are not there yet; with none and no problem, all begin."""

    missing: list[int] = []
    problem: str | None = None


def muster(placement: Placement, deadline: float = DEADLINE) -> None:
    """Wait for all nodes of a run. Raises UserError, on every node that can be told, when they do not come within
    ``deadline`` seconds, do not agree, or cannot meet there. A signal ends it at once."""
    with contextlib.ExitStack() as closers:
        host = Host(placement) if placement.node == 0 else None
        if host is not None:
            closers.callback(host.close)
        guest = Guest(placement, host)
        closers.callback(guest.close)
        until, patience = time.monotonic() + deadline, time.monotonic() + PATIENCE
        while not guest.may_go:
            guest.look()
            now = time.monotonic()
            if now > until:
                raise UserError(f"{guest.waits_for()}: it did not come within {deadline:g} s. {_REMEDY}")
            if now > patience:
                patience = float("inf")
                print(f"outrider: {guest.waits_for()}, up to {deadline:g} s", file=sys.stderr, flush=True)


_REMEDY = (
    "All nodes are started with the same MASTER_ADDR and MASTER_PORT, which are those of the node with NODE_RANK=0; no "
    "firewall may lie between them"
)


class Host:
    """Node 0's side: whoever has come."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self._present: dict[int, tuple[socket.socket, Arrival]] = {}
        self._strangers: list[socket.socket] = []
        try:
            # Of both families where there are two: MASTER_ADDR may be of either.
            dual = socket.has_dualstack_ipv6()
            self._listener = socket.create_server(
                ("", placement.port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual
            )
        except OSError as error:
            raise UserError(
                f"node 0 cannot listen on MASTER_PORT={placement.port} ({error.strerror}): another program, another "
                "run, or a second node with NODE_RANK=0 has it on this host; choose another one, the same on all nodes"
            ) from error

    def close(self) -> None:
        """Let go of the port."""
        for connection, _ in self._present.values():
            connection.close()
        for connection in self._strangers:
            connection.close()
        self._listener.close()

    def sockets(self) -> list[socket.socket]:
        """Where something may come."""
        return [self._listener, *self._strangers, *(connection for connection, _ in self._present.values())]

    def serve(self, ready: list[socket.socket]) -> None:
        """Take what has come on ``ready``, and tell everybody how things stand. Raises UserError."""
        before = dict(self._present)
        if len(before) == self.placement.nodes:  # they have been told to go, and do
            return
        for connection in ready:
            if connection is self._listener:
                self._strangers.append(connection.accept()[0])
            elif connection in self._strangers:
                self._strangers.remove(connection)
                self._meet(connection)
            else:  # it has nothing more to say: it has left
                self._present = {node: item for node, item in self._present.items() if item[0] is not connection}
                connection.close()
        if before != self._present:
            missing = [node for node in range(self.placement.nodes) if node not in self._present]
            self._tell(Answer(missing))

    def _meet(self, connection: socket.socket) -> None:
        try:
            [guest] = receive(connection, Arrival)
        except (OSError, ValueError):  # a stranger
            connection.close()
            return
        other = self._present.get(guest.node)
        if problem := _disagreement(self.placement, guest, None if other is None else other[1]):
            with contextlib.suppress(OSError):
                send(connection, Answer(problem=problem))
            connection.close()
            self._tell(Answer(problem=problem))
            raise UserError(problem)
        self._present[guest.node] = connection, guest

    def _tell(self, answer: Answer) -> None:
        for connection, _ in self._present.values():
            with contextlib.suppress(OSError):  # it has left, which is heard next
                send(connection, answer)


class Guest:
    """A node's own side."""

    def __init__(self, placement: Placement, host: Host | None) -> None:
        self.placement, self.host = placement, host
        self.may_go = False
        self._name = socket.gethostname()
        self._connection: socket.socket | None = None
        self._missing: list[int] | None = None
        self._problem = "it was not asked yet"
        self._again = 0.0

    def close(self) -> None:
        """Leave."""
        if self._connection is not None:
            self._connection.close()

    def waits_for(self) -> str:
        """In words."""
        place = f"{self.placement.address}:{self.placement.port}"
        me = f"node {self.placement.node} of {self.placement.nodes} ({self._name}) waits"
        if self._missing:
            absent = ", ".join(map(str, self._missing))
            return f"{me} at {place} for node{'s' if len(self._missing) > 1 else ''} {absent}"
        if self.placement.node == 0:
            return f"{me} for itself at MASTER_ADDR and MASTER_PORT, {place} ({self._problem})"
        return f"{me} for node 0 at {place} ({self._problem})"

    def look(self) -> None:
        """Go on by what has come, or by what it is time for; a fraction of a second. Raises UserError."""
        if self._connection is None and time.monotonic() >= self._again:
            self._come()
        mine = [] if self._connection is None else [self._connection]
        ready, _, _ = select.select([*mine, *(self.host.sockets() if self.host else [])], [], [], 0.2)
        if self.host is not None:
            self.host.serve([connection for connection in ready if connection not in mine])
        if self._connection in ready:
            self._hear(self._connection)

    def _come(self) -> None:
        arrival = Arrival(self.placement.node, self.placement.nodes, self.placement.processes, self._name)
        try:
            # The host, which is this thread, need not accept for that.
            self._connection = socket.create_connection((self.placement.address, self.placement.port), 3.0)
            send(self._connection, arrival)
            self._problem = "it does not answer"
        except OSError as error:
            self._away(str(error.strerror or error))

    def _hear(self, connection: socket.socket) -> None:
        try:
            for answer in receive(connection, Answer):
                if answer.problem is not None:
                    raise UserError(answer.problem)
                self._missing, self.may_go = answer.missing, not answer.missing
        except OSError as error:
            self._away(str(error.strerror or error))
        except msgspec.MsgspecError:
            self._away("something else answers there")

    def _away(self, problem: str) -> None:
        self.close()
        self._connection, self._missing, self._problem = None, None, problem
        self._again = time.monotonic() + AGAIN


def _disagreement(placement: Placement, guest: Arrival, other: Arrival | None) -> str | None:
    """Why ``guest`` cannot be one of the nodes. other: who has come under its number already."""
    if guest.nodes != placement.nodes:
        return (
            f"NNODES={guest.nodes} on node {guest.node} ({guest.host}) and NNODES={placement.nodes} on node 0 "
            f"({socket.gethostname()}): set the same on all nodes"
        )
    if guest.processes != placement.processes:
        return (
            f"node {guest.node} ({guest.host}) has {guest.processes} processes and node 0 ({socket.gethostname()}) "
            f"{placement.processes}: set the same NPROC_PER_NODE on all nodes, or show them as many GPUs"
        )
    if other is not None:
        return f"NODE_RANK={guest.node} was given to {other.host} and to {guest.host}: give each node its own"
    return None
