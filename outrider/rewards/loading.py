"""From what stands on the command line to a reward function."""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from outrider.contract.errors import UserError
from outrider.rewards.accuracy import accuracy, require_math_verify
from outrider.rewards.exact_match import exact_match
from outrider.rewards.format import format_reward
from outrider.rewards.repetition import repetition
from outrider.rewards.settings import RewardSettings
from outrider.rewards.soft_overlong import soft_overlong

Rewards: TypeAlias = list[float | None]
RewardFunction: TypeAlias = Callable[..., Rewards | Awaitable[Rewards]]


#: Columns that every reward function is given, whatever the dataset has.
GIVEN_COLUMNS = frozenset({"prompts", "completion_ids"})


@dataclass(frozen=True)
class Reward:
    """A reward function, the name it is logged under, and whether calling it gives an awaitable.

    A function from a plugin file pickles only into processes that have loaded the file themselves: send the
    spec to a worker and call `load_reward` there.
    """

    name: str
    function: RewardFunction
    is_async: bool

    @property
    def needed_columns(self) -> list[str]:
        """Columns that it cannot be called without: its parameters that have no default."""
        kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):  # a callable written in C does not tell
            return []
        needed = [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]
        return [name for name in needed[1:] if name not in GIVEN_COLUMNS]


def load_reward(spec: str, settings: RewardSettings, external_plugins: list[str]) -> Reward:
    """Find the reward function that spec names:

    - `name`: a built-in one, or a function or class defined in one of the external plugins (.py files);
    - `pkg.module:name`, from an importable module; the working directory counts;
    - `path/to/file.py:name`.

    A class is instantiated without arguments, and its instances must be callable. A file is executed once in
    a process, however many rewards come from it.

    UserError, with what was found and the remedy, if there is no such thing, if it cannot be loaded, or if
    two places define the same bare name.
    """
    # Without repetition: a file given twice is no ambiguity.
    plugins = list(dict.fromkeys(_load_file(path, spec) for path in external_plugins))
    place, separator, name = spec.rpartition(":")
    if separator:
        if not place or not name:
            raise UserError(
                f"the reward {spec!r} is incomplete: write path/to/file.py:function or package.module:function"
            )
        is_file = place.endswith(".py")
        module = _load_file(place, spec) if is_file else _load_module(place, spec)
        return _from_module(module, name, spec)
    homes = [module for module in plugins if name in _candidates(module)]
    if len(homes) + (name in BUILT_IN) > 1:
        found = ["the built-in one"] * (name in BUILT_IN) + [f"{module.__file__}:{name}" for module in homes]
        raise UserError(f"the reward {name!r} is ambiguous ({', '.join(found)}): name the file, as in {found[-1]}")
    if homes:
        return _from_module(homes[0], name, spec)
    if name in BUILT_IN:
        return Reward(name, BUILT_IN[name](settings), is_async=False)
    raise UserError(_unknown(name, plugins))


def _build_accuracy(settings: RewardSettings) -> RewardFunction:
    require_math_verify()  # now, rather than at the first answer that is not a numeral
    return accuracy


def _build_repetition(settings: RewardSettings) -> RewardFunction:
    return partial(repetition, n_grams=settings.repetition_n_grams, max_penalty=settings.repetition_max_penalty)


def _build_soft_overlong(settings: RewardSettings) -> RewardFunction:
    longest, cache = settings.soft_lengths()
    return partial(soft_overlong, soft_max_length=longest, soft_cache_length=cache)


BUILT_IN: dict[str, Callable[[RewardSettings], RewardFunction]] = {
    "accuracy": _build_accuracy,
    "exact_match": lambda settings: exact_match,
    "format": lambda settings: format_reward,
    "repetition": _build_repetition,
    "soft_overlong": _build_soft_overlong,
}


def _from_module(module: ModuleType, name: str, spec: str) -> Reward:
    found = getattr(module, name, None)
    if not callable(found):
        home = module.__file__ or module.__name__
        what = f"no {name!r}" if found is None else f"{name!r}, but it is not callable: {found!r:.80}"
        raise UserError(
            f"the reward {spec!r} was not found. {home} has {what}. It defines: "
            f"{', '.join(_candidates(module)) or 'no public function or class'}"
        )
    if inspect.isclass(found):
        found = _instance(found, module, spec)
    return Reward(name, found, _is_async(found))


def _instance(cls: type[Any], module: ModuleType, spec: str) -> RewardFunction:
    try:
        instance = cls()
    except Exception as error:
        raise UserError(
            f"the reward {spec!r} is a class, and {cls.__name__}() failed{_where(error, module.__file__)}. "
            "Reward classes are made without arguments: give every parameter a default"
        ) from error
    if not callable(instance):
        raise UserError(
            f"the reward {spec!r} is a class without __call__: define "
            "`def __call__(self, completions, **columns)`, returning one reward per completion"
        )
    return instance


def _is_async(function: RewardFunction) -> bool:
    # An object is async if its __call__ is; a function's own __call__ never is.
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _candidates(module: ModuleType) -> list[str]:
    """Names of the public callables that the module itself defines; what it imported is not its own."""
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    )


def _unknown(name: str, plugins: list[ModuleType]) -> str:
    known = sorted({*BUILT_IN, *(candidate for module in plugins for candidate in _candidates(module))})
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    own = "".join(f"; {module.__file__} defines {', '.join(_candidates(module))}" for module in plugins)
    return (
        f"there is no reward {name!r}: {hint}Built in are {', '.join(BUILT_IN)}{own}. For your "
        "own write path/to/file.py:function or package.module:function, or use --external_plugins"
    )


def _load_file(path: str, spec: str) -> ModuleType:
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"the reward {spec!r} needs the plugin {path}, and there is no file {file}")
    # Named after the whole path: two plugins may both be called rewards.py.
    name = f"outrider_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    loader = importlib.util.spec_from_file_location(name, file)
    if loader is None or loader.loader is None:
        raise UserError(f"the reward {spec!r} needs the plugin {file}, which is not a Python file (.py)")
    module = importlib.util.module_from_spec(loader)
    _make_importable(file.parent)
    sys.modules[name] = module
    try:
        loader.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(
            f"the reward {spec!r} needs the plugin {file}, which failed to load{_where(error, str(file))}"
        ) from error
    return module


def _load_module(name: str, spec: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(
                f"the reward {spec!r} needs the module {name!r}, and there is no module {error.name!r} here: "
                "install it, or write path/to/file.py:function"
            ) from error
        raise UserError(f"the reward {spec!r}: {name} failed to load{_where(error, None)}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"the reward {spec!r}: {name} failed to load{_where(error, None)}") from error


def _make_importable(folder: Path) -> None:
    """Let a plugin import its neighbours; from the end of the path, where they hide no installed module."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _where(error: BaseException, file: str | None) -> str:
    """` at FILE:LINE: SOURCE (ERROR)`: the innermost line in file, or of any module if there is no file."""
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return f" at {error.filename}:{error.lineno}: {(error.text or '').strip()} ({what})"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if (file is None or frame.filename == file)
        and frame.filename != __file__
        and not frame.filename.startswith("<frozen")
        and not frame.filename.startswith(os.path.dirname(importlib.__file__))
    ]
    return f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line} ({what})" if frames else f" ({what})"
