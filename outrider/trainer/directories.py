"""Directories that are written whole, or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from outrider.contract.disk import synchronize

_UNFINISHED, _REPLACED = ".unfinished", ".replaced"


class SaveFailed(Exception):
    """A directory could not be written; nothing of it is left, and earlier ones are untouched."""


def write_directory(path: Path, write: Callable[[Path], None], nbytes: int) -> None:
    """Have ``write(directory)`` fill a directory beside ``path`` and move it there when it is whole and on disk.
    nbytes: about what it will take. Raises SaveFailed."""
    unfinished = begin_directory(path, nbytes)
    with finishing(path):
        write(unfinished)


def unfinished_path(path: Path) -> Path:
    """Where ``path`` is written before it is whole."""
    return path.with_name(path.name + _UNFINISHED)


def begin_directory(path: Path, nbytes: int) -> Path:
    """An empty directory in which to write what ``path`` shall hold.

    nbytes: about what it will take. Where less is free nothing is written, since a disk that is filled to the brim
    takes the ledger's next rows from the collector, and with them the run. Raises SaveFailed.
    """
    unfinished = unfinished_path(path)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        if shutil.disk_usage(path.parent).free < nbytes:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: it takes {nbytes / 2**20:,.1f} MiB")
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise failure(path, error) from error
    return unfinished


@contextlib.contextmanager
def finishing(path: Path) -> Iterator[None]:
    """Write the rest of it within; then it gets its name. Raises SaveFailed, and nothing is left, when that fails."""
    unfinished = unfinished_path(path)
    try:
        yield
        for file in [*unfinished.rglob("*"), unfinished]:
            synchronize(file)
        _replace(path, unfinished)
        synchronize(path.parent)
    except SaveFailed:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    except (OSError, RuntimeError, MemoryError, ValueError, SafetensorError) as error:
        # A full disk is a RuntimeError where torch meets it, and an error of its own where safetensors does.
        shutil.rmtree(unfinished, ignore_errors=True)
        raise failure(path, error) from error


def failure(path: Path, error: Exception) -> SaveFailed:
    """What to say of ``path``, which ``error`` kept from being written."""
    return SaveFailed(f"{path}: {first_line(error)}{_free_space(path.parent)}")


def tidy(output_dir: Path) -> None:
    """Remove what a killed process left half written, and bring back what it was about to replace."""
    for old in output_dir.glob(f"*{_REPLACED}"):
        path = old.with_name(old.name.removesuffix(_REPLACED))
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(path)
    for unfinished in output_dir.glob(f"*{_UNFINISHED}"):
        shutil.rmtree(unfinished, ignore_errors=True)


def _replace(path: Path, new: Path) -> None:
    """Put ``new`` where ``path`` is. What was there goes only when ``new`` has its place: whoever kills this process
    loses neither."""
    old = path.with_name(path.name + _REPLACED)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def first_line(error: BaseException) -> str:
    """The cause in a line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _free_space(directory: Path) -> str:
    with contextlib.suppress(OSError):
        return f" ({shutil.disk_usage(directory).free / 2**20:,.1f} MiB are free there)"
    return ""
