"""What every console command does around its work: errors for people, exit status, interruption."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from outrider.contract.errors import UserError
from outrider.contract.output import say

Command = Callable[[list[str]], int]

#: Loaded by processes that train.
_TRAINED = "outrider.trainer.ranks"


def run_command(program: str, command: Command, argv: list[str]) -> int:
    """The command's exit status; 2 for a UserError, whose message alone is printed, and 130 for Ctrl-C."""
    try:
        return command(argv)
    except UserError as error:
        say("\n".join(f"{program}: {line}" for line in str(error).splitlines()))
        return 2
    except KeyboardInterrupt:
        say(f"{program}: interrupted")
        return 130


def be_process(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` and end this process with its exit status, however it ends."""
    try:
        status = main()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            say(ended.code)
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - said as Python says it, and the process ends
        say(traceback.format_exc().rstrip())
        status = 1
    leave(status)


def leave(status: int) -> NoReturn:
    """End this process. One that has trained does not take the interpreter apart first: a thread of torch's process
    groups that lets go of a tensor meanwhile, the last one that this rank has heard, would abort it."""
    if _TRAINED not in sys.modules:
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(status)
