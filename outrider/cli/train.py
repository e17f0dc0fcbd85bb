"""``outrider train``: one process of a training run."""

import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from outrider.cli.describe import describe
from outrider.cli.flag_help import help_text
from outrider.cli.flags import asks_for_help
from outrider.cli.placement import find_placement
from outrider.cli.resume import check_resume
from outrider.cli.specs import make_specs
from outrider.cli.train_config import TRAIN, TrainConfig, parse_train, resolve
from outrider.contract.errors import UserError
from outrider.contract.output import show
from outrider.contract.threads import yield_idle_threads


def main(argv: list[str]) -> int:
    """Run the command; its exit status."""
    if asks_for_help(argv):
        show(help_text(TRAIN))
        return 0
    return start(parse_train(argv), ["outrider.cli.main", "train", *argv])


def start(config: TrainConfig, command: list[str], notices: Sequence[str] = ()) -> int:
    """Train, or print what would be done with ``--dry_run``. Only the first process prints. command: the module and
    arguments that have led here, for processes to be started with. notices: lines for the user, which would come twice
    from whoever starts processes."""
    placement = find_placement(os.environ)
    resolved = resolve(config, placement.data_size(config.model.tensor_parallel_size))
    if config.run.dry_run:
        if is_first_process(os.environ):
            notify(notices)
            check_resume(config.run)
            show(describe(config, resolved, placement))
        return 0
    if placement.launches:
        from outrider.cli.launch import launch

        return launch(placement, command)
    if is_first_process(os.environ):
        notify([*notices, *(f"outrider: warning: {warning}" for warning in resolved.warnings)])
        prepare_output_dir(Path(config.run.output_dir))
    yield_idle_threads()
    from outrider.trainer.run import train

    trainer, collector = make_specs(config, resolved)
    return train(trainer, msgspec.msgpack.encode(collector), lambda: check_resume(config.run))


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


def notify(lines: Iterable[str]) -> None:
    """Tell the user something."""
    for line in lines:
        print(line, file=sys.stderr)


def is_first_process(environment: Mapping[str, str]) -> bool:
    """Whether this is rank 0, or the only process."""
    return environment.get("RANK", "0") == "0"
