"""Ctrl-C and SIGTERM: once means finish the step and save, twice means stop now."""

import signal
import threading
import time
from collections.abc import Callable

from outrider.contract.lifetime import end_now
from outrider.contract.signals import hear_at_once

#: Seconds within which a further SIGTERM is the first one: a cluster sends it to every process of a job, and a launcher
#: hands on what it was sent.
AS_ONE = 2.0


class Interrupt:
    """Notes the first signal; the second one ends the process at once."""

    def __init__(self, on_first: Callable[[], None], on_second: Callable[[], None]) -> None:
        """on_first: tells the user. on_second: last words before the process ends. Both are called on threads of their
        own."""
        self.requested = False
        self._first: float | None = None
        self._on_first, self._on_second = on_first, on_second
        #: Puts back the handlers that were there before.
        self.restore = hear_at_once((signal.SIGINT, signal.SIGTERM), self._hear)

    def request(self) -> None:
        """Finish the step and save, as another node asks; any number of them are one."""
        if not self.requested:
            self.requested = True
            threading.Thread(target=self._on_first, daemon=True).start()

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self.request()
        elif number == signal.SIGINT or now - self._first > AS_ONE:
            end_now(self._on_second, 128 + number)
