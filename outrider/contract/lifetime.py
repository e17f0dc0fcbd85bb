"""How processes end: children with whoever started them, and any process at once, whatever its threads do."""

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Callable
from typing import NoReturn

#: Seconds for the last words of a process, which may wait for a terminal that has been stopped.
LAST_WORDS = 5.0
_PR_SET_PDEATHSIG = 1


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent is gone, however it went. Linux only; elsewhere
    nothing happens, and children are ended by a parent that ends in order."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)


def end_now(last_words: Callable[[], None], status: int) -> NoReturn:
    """End this process, from any thread, without waiting for its others or for ``last_words`` that do not end."""
    words = threading.Thread(target=last_words, daemon=True)
    words.start()
    words.join(LAST_WORDS)
    os._exit(status)
