"""The ranks of several nodes meet in torch's store, before a collective waits for anybody: who is missing is named.
Where the ranks of a node have ended instead of coming, whoever has started them leaves word of it there. Node 0 keeps
the store, and when it is gone, so is that node.
"""

import contextlib
import datetime
import os
import socket
import time
from collections.abc import Callable, Sequence

from torch.distributed import Store, TCPStore

from outrider.contract.errors import UserError
from outrider.contract.output import say

#: Seconds for all ranks to come, which the launchers have started at the same time; those after which one says whom it
#: waits for; and those between two looks.
DEADLINE = 600.0
PATIENCE = 15.0
LOOK = 0.1
#: Seconds to reach the store, which was there before any rank, and to leave word in it.
CONNECT = 30.0
LEAVING = 5.0

#: In the store: how many ranks are there, and what has been said of one that has ended.
_PRESENT, _ENDED = "ranks that are here", "ended before all had met"


class Meeting:
    """One rank's side."""

    def __init__(self, rank: int, per_node: int) -> None:
        """Reach the store that torchrun has named in the environment. per_node: ranks of each node. Raises
        UserError."""
        self._rank, self._per_node = rank, per_node
        try:
            self.store = _store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), CONNECT)
        except (OSError, RuntimeError) as error:
            raise self._alone(error) from error

    def come(self) -> None:
        """Be there from now on, once."""
        self.store.set(_place(self._rank), "")
        self.store.add(_PRESENT, 1)

    def wait_for_first(self) -> None:
        """Until rank 0 is there. Raises UserError when it does not come, or another one has ended and cannot come."""
        self._wait(lambda: self.store.check([_place(0)]), range(1))

    def wait_for_all(self, size: int) -> None:
        """Until all are there, ``size`` ranks. Raises UserError as well."""
        # One number for all of them: each of a thousand ranks asks for it ten times a second.
        self._wait(lambda: self.store.add(_PRESENT, 0) >= size, range(size))

    def _wait(self, are_there: Callable[[], bool], ranks: Sequence[int]) -> None:
        try:
            self._look(are_there, ranks)
        except RuntimeError as error:
            raise self._alone(error) from error

    def _look(self, are_there: Callable[[], bool], ranks: Sequence[int]) -> None:
        until, patience = time.monotonic() + DEADLINE, time.monotonic() + PATIENCE
        while not are_there():
            if self.store.check([_ENDED]):
                raise UserError(f"{self.store.get(_ENDED).decode()}; its output says more")
            now = time.monotonic()
            if now > until:
                raise UserError(
                    f"{self._name(self._rank)} has waited {DEADLINE:g} s for {self._missing(ranks)}, which "
                    "should have been started there when all nodes had met: see what that node does"
                )
            if now > patience:
                patience = float("inf")
                if self._rank % self._per_node == 0:  # once on each node
                    say(f"outrider: {self._name(self._rank)} waits for {self._missing(ranks)}, up to {DEADLINE:g} s")
            time.sleep(LOOK)

    def _missing(self, ranks: Sequence[int]) -> str:
        missing = [rank for rank in ranks if not self.store.check([_place(rank)])]
        named = ", ".join(map(self._name, missing[:4]))
        return named if len(missing) <= 4 else f"{named} and {len(missing) - 4} more"

    def _name(self, rank: int) -> str:
        return f"rank {rank} on node {rank // self._per_node}"

    def _alone(self, error: Exception) -> UserError:
        return UserError(
            f"{self._name(self._rank)} cannot reach node 0, which was there when the nodes met and has ended before "
            f"their ranks had ({str(error).splitlines()[0]}): its output says more"
        )


def leave_word(address: str, port: int, text: str) -> None:
    """In the store at ``address`` and ``port``: have ranks that wait for those of this node end, and say ``text``.
    Nobody looks once all have met."""
    with contextlib.suppress(OSError, RuntimeError):  # it is gone
        _store(address, port, LEAVING).set(_ENDED, text)


def _store(address: str, port: int, seconds: float) -> Store:
    # Torch would go on trying where nobody listens any more.
    socket.create_connection((address, port), seconds).close()
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=seconds))


def _place(rank: int) -> str:
    return f"rank {rank} is here"
