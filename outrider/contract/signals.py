"""Signals that are heard at once, whatever the main thread does."""

import os
import signal
import threading
from collections.abc import Callable


def hear_at_once(numbers: tuple[signal.Signals, ...], heard: Callable[[int], None]) -> Callable[[], None]:
    """Call ``heard`` with the number of each of these signals, on a thread: the main one may be in a call that does not
    return before its deadline, and Python's own handlers wait for it; or it is in the middle of a line, and holds a
    lock, that ``heard`` needs as well. From the main thread, as is what this returns, which puts back what was there
    before."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    woken = signal.set_wakeup_fd(writing)
    before = {number: signal.signal(number, lambda number, frame: None) for number in numbers}

    def watch() -> None:
        while data := os.read(reading, 64):
            for number in data:
                if number in numbers:
                    heard(number)
        os.close(reading)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        os.close(writing)

    threading.Thread(target=watch, name="signals", daemon=True).start()
    return restore
