"""What every console command does around its work: errors for people, exit status, interruption."""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from outrider.contract.errors import UserError

Command = Callable[[list[str]], int]


def run_command(program: str, command: Command, argv: list[str]) -> int:
    """The command's exit status; 2 for a UserError, whose message alone is printed, and 130 for Ctrl-C."""
    try:
        return command(argv)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"{program}: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def leave(status: int) -> NoReturn:
    """End this process. One that torchrun has started does not take the interpreter apart first: a thread of torch's
    process groups that lets go of a tensor meanwhile, the last one that this rank has heard, would abort it."""
    if "LOCAL_RANK" not in os.environ:
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(status)
