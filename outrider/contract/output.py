"""Writing for people, whose reader, such as ``head`` or ``tee``, may leave before the end."""

import contextlib
import os
import sys


def show(text: str) -> None:
    """Print text; a reader that has left is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        drop_output()


def say(text: str) -> None:
    """On standard error, if anybody reads it still."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def drop_output() -> None:
    """Let standard output go nowhere from now on: nobody reads it any more, and Python flushes it once more when it
    exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
