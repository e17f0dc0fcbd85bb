"""``outrider train``: one process of a training run."""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from outrider.cli.describe import describe
from outrider.cli.entry import show
from outrider.cli.flag_help import help_text
from outrider.cli.flags import asks_for_help
from outrider.cli.specs import make_specs
from outrider.cli.train_config import TRAIN, TrainConfig, parse_train, resolve
from outrider.contract.errors import UserError
from outrider.contract.threads import yield_idle_threads

#: What describes a launch over processes and nodes in the environment; torchrun's options have the same names.
_LAUNCH = ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT")


def main(argv: list[str]) -> int:
    """Run the command; its exit status."""
    if asks_for_help(argv):
        show(help_text(TRAIN))
        return 0
    return start(parse_train(argv))


def start(config: TrainConfig) -> int:
    """Train, or print what would be done with ``--dry_run``. Only the first process prints."""
    resolved = resolve(config, world_size(os.environ))
    if config.run.dry_run:
        if is_first_process(os.environ):
            show(describe(config, resolved))
        return 0
    if is_first_process(os.environ):
        for warning in resolved.warnings:
            print(f"outrider: warning: {warning}", file=sys.stderr)
    if resolved.world_size > 1:
        raise UserError(
            f"{resolved.world_size} trainer processes: this version trains with one; start it without torchrun"
        )
    prepare_output_dir(Path(config.run.output_dir))
    yield_idle_threads()
    from outrider.trainer.run import train

    trainer, collector = make_specs(config, resolved)
    return train(trainer, msgspec.msgpack.encode(collector))


def prepare_output_dir(path: Path) -> None:
    """Make the run's directory. UserError where it cannot be made or written to, before anything is loaded."""
    remedy = "choose a directory that you can write to"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"--output_dir {path} is a file: {remedy}") from error
    except OSError as error:
        raise UserError(f"--output_dir {path} cannot be made ({error.strerror}): {remedy}") from error
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"--output_dir {path} cannot be written to ({error.strerror}): {remedy}") from error


def is_first_process(environment: Mapping[str, str]) -> bool:
    """Whether this is rank 0, or the only process."""
    return environment.get("RANK", "0") == "0"


def world_size(environment: Mapping[str, str]) -> int:
    """Processes of the run, from torchrun's environment.

    UserError where NPROC_PER_NODE or NNODES ask for several and nothing started them: training with fewer than
    were asked for would be another run.
    """
    if "WORLD_SIZE" in environment:
        return _count(environment, "WORLD_SIZE")
    nodes, processes = _count(environment, "NNODES"), _count(environment, "NPROC_PER_NODE")
    if nodes * processes > 1:
        launch = " ".join(f"--{name.lower()} {environment[name]}" for name in _LAUNCH if name in environment)
        raise UserError(
            f"NNODES={nodes} and NPROC_PER_NODE={processes} ask for {nodes * processes} processes, and torchrun did "
            f"not start this one: put 'torchrun {launch} --no_python' before the command, or unset them"
        )
    return 1


def _count(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{name}={text}: expected a whole number of at least 1")
    return int(text)
