"""Ctrl-C and SIGTERM: once means finish the step and save, twice means stop now."""

import os
import signal
from collections.abc import Callable
from types import FrameType


class Interrupt:
    """Notes the first signal; the second one ends the process at once."""

    def __init__(self, on_first: Callable[[], None], on_second: Callable[[], None]) -> None:
        """on_first: tells the user. on_second: last words before the process ends."""
        self.requested = False
        self._signals = 0
        self._on_first, self._on_second = on_first, on_second
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def request(self) -> None:
        """Finish the step and save, as another node asks; any number of them are one."""
        if not self.requested:
            self.requested = True
            self._on_first()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            self._on_second()
            os._exit(128 + number)
        self.request()
