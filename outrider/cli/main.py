"""The console command ``outrider``."""

import difflib
import importlib
import sys
from typing import NoReturn

import outrider
from outrider.cli.entry import Command, be_process, run_command
from outrider.contract.errors import UserError
from outrider.contract.output import show

#: Where each command is, imported when it is called, and what it does.
_COMMANDS = {
    "rollout": ("outrider.cli.rollout", "serve a model for rollouts"),
    "train": ("outrider.cli.train", "train a model on the rollouts of servers"),
    "demo": ("outrider.demo.run", "learn a small task on this machine, from start to end"),
    "show": ("outrider.cli.show", "look into the directory of a run"),
}


def main(argv: list[str] | None = None) -> int:
    """Run ``outrider COMMAND ...``; its exit status."""
    return run_command("outrider", _dispatch, sys.argv[1:] if argv is None else argv)


def console() -> NoReturn:
    """Be the command, and end with its exit status."""
    be_process(main)


def _dispatch(argv: list[str]) -> int:
    name, *rest = argv or ["--help"]
    if name in ("--help", "-h", "help"):
        show(_help())
        return 0
    if name in ("version", "--version"):
        show(f"outrider {outrider.__version__}")
        return 0
    return _command(name)(rest)


def _command(name: str) -> Command:
    if name not in _COMMANDS:
        near = difflib.get_close_matches(name, [*_COMMANDS, "version"], n=1)
        remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(_COMMANDS)} and version"
        raise UserError(f"{name!r} is not a command: {remedy}")
    command: Command = importlib.import_module(_COMMANDS[name][0]).main
    return command


def _help() -> str:
    lines = ["usage: outrider COMMAND [--flag value ...]", "", outrider.__doc__ or "", "", "Commands:"]
    lines += [f"  {name:<9} {about}" for name, (_, about) in _COMMANDS.items()]
    lines += [f"  {'version':<9} print the version", "", "'outrider COMMAND --help' lists the flags of a command."]
    return "\n".join(lines)


if __name__ == "__main__":
    console()
