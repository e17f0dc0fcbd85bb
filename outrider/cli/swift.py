"""The console command ``swift``: ms-swift's command lines for GRPO with a rollout server, run by this project.

Flags that both have mean the same. Those that ours lacks are in :mod:`outrider.cli.swift_flags`: each is reported in
one line or refused, and none is dropped in silence.
"""

import re
import sys
from collections.abc import Mapping
from typing import NoReturn

from outrider.cli import rollout, train
from outrider.cli.entry import be_process, run_command
from outrider.cli.flag_help import help_text
from outrider.cli.flags import Given, asks_for_help
from outrider.cli.swift_flags import ROLLOUT_FLAGS, TRAIN_FLAGS, SwiftFlag
from outrider.cli.train_config import TRAIN, train_config
from outrider.contract.errors import UserError
from outrider.contract.output import show

_USAGE = "'swift rollout ...' and 'swift rlhf --rlhf_type grpo ...'"


def main(argv: list[str] | None = None) -> int:
    """Run ``swift rollout`` or ``swift rlhf``; its exit status."""
    return run_command("swift", _dispatch, sys.argv[1:] if argv is None else argv)


def console() -> NoReturn:
    """Be the command, and end with its exit status."""
    be_process(main)


def _dispatch(argv: list[str]) -> int:
    name, *rest = argv or ["--help"]
    if name in ("--help", "-h", "help"):
        show(f"usage: {_USAGE}\n\nms-swift's command lines, run by outrider. 'swift COMMAND --help' lists the flags.")
        return 0
    commands = {"rollout": _rollout, "rlhf": _rlhf}
    if name not in commands:
        raise UserError(f"{name!r} is not a command here: this swift runs {_USAGE}, with outrider")
    return commands[name](rest)


def _rollout(argv: list[str]) -> int:
    if asks_for_help(argv):
        show(help_text(rollout.ROLLOUT))
        return 0
    given, notices = _sift(rollout.ROLLOUT.collect(argv), ROLLOUT_FLAGS)
    train.notify(notices)
    return rollout.start(rollout.rollout_config(rollout.ROLLOUT.convert(given)))


def _rlhf(argv: list[str]) -> int:
    if asks_for_help(argv):
        show(help_text(TRAIN))
        return 0
    collected = TRAIN.collect(argv)
    kind = collected.get("rlhf_type")
    if kind is None or kind.values != ("grpo",):
        found = "no --rlhf_type" if kind is None else str(kind)
        raise UserError(f"found {found}: this swift trains with GRPO alone; give --rlhf_type grpo")
    given, notices = _sift(collected, TRAIN_FLAGS)
    _check_datasets(given)
    if not collected.keys() & {"train_type", "tuner_type"}:
        notices.append("swift: --train_type is not given: all weights are trained, as with --train_type full")
    return train.start(train_config(TRAIN.convert(given)), ["outrider.cli.swift", "rlhf", *argv], notices)


def _sift(given: Mapping[str, Given], table: Mapping[str, SwiftFlag]) -> tuple[dict[str, Given], list[str]]:
    """What is left for our flags, and what to say of the others. UserError names everything that is refused."""
    foreign = {name: item for name, item in given.items() if name in table}
    asking = {name: item for name, item in foreign.items() if not _is_same(item, table[name])}
    refused = [f"{item} is refused: {table[name].reason}" for name, item in asking.items() if table[name].refused]
    if refused:
        raise UserError("\n".join(refused))
    notices = [f"swift: {item} is not used: {table[name].reason}" for name, item in asking.items()]
    return {name: item for name, item in given.items() if name not in foreign}, notices


def _is_same(item: Given, flag: SwiftFlag) -> bool:
    bare = "none" if item.place else "true"  # an empty list in a file; a flag alone on the command line
    values = item.values or (bare,)
    return all(value.lower() in flag.same for value in values)


def _check_datasets(given: Mapping[str, Given]) -> None:
    for name in ("dataset", "val_dataset"):
        for value in given[name].values if name in given else ():
            if re.search(r"#\d+$", value):
                raise UserError(
                    f"--{name} {value}: samples of a dataset cannot be asked for with '#'; write them to a file, or "
                    "bound the run with --max_steps"
                )
            if "::" in value:
                raise UserError(
                    f"--{name} {value}: hubs cannot be chosen with '::'; ids are those of the Hugging Face hub, "
                    "other data is given as files"
                )


if __name__ == "__main__":
    console()
