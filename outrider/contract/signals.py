"""Signals that are heard at once, whatever the main thread does."""

import os
import signal
import threading
from collections.abc import Callable


def hear_at_once(numbers: tuple[signal.Signals, ...], heard: Callable[[int], None]) -> None:
    """Call ``heard`` with the number of each of these signals, from a thread: the main one may be in a call that does
    not return before its deadline, and Python's own handlers wait for it. From the main thread, once in a process."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    for number in numbers:
        signal.signal(number, lambda number, frame: None)

    def watch() -> None:
        while True:
            for number in os.read(reading, 64):
                if number in numbers:
                    heard(number)

    threading.Thread(target=watch, name="signals", daemon=True).start()
