"""What every console command does around its work: errors for people, exit status, interruption."""

import os
import sys
from collections.abc import Callable

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


def show(text: str) -> None:
    """Print text; a reader that leaves early, such as ``head``, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes stdout once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
