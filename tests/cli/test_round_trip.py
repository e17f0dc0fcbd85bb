"""Whatever settings are written as flags, the same settings are read."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect

from outrider.cli.flags import Flag, FlagSet
from outrider.cli.rollout import ROLLOUT
from outrider.cli.train_config import TRAIN
from outrider.cli.values import as_texts
from outrider.contract.errors import UserError

BIG = 2**53


def items(flag: Flag) -> st.SearchStrategy[Any]:
    info = inspect.type_info(flag.shape.item)
    kind = info.type if isinstance(info, inspect.Metadata) else info
    match kind:
        case inspect.BoolType():
            return st.booleans()
        case inspect.LiteralType():
            return st.sampled_from(kind.values)
        case inspect.IntType():
            return st.integers(-BIG if kind.ge is None else kind.ge, BIG if kind.le is None else kind.le)
        case inspect.FloatType():
            low = kind.ge if kind.gt is None else kind.gt
            high = kind.le if kind.lt is None else kind.lt
            return st.floats(
                low,
                high,
                allow_nan=False,
                allow_infinity=False,
                exclude_min=kind.gt is not None,
                exclude_max=kind.lt is not None,
            )
        case _:
            # A word that reads as another flag, or as nothing, cannot be the value of a list or of an optional flag.
            return st.text(st.characters(codec="utf-8"), min_size=1).filter(
                lambda text: not text.startswith("--") and text.lower() not in ("none", "null")
            )


def settings(flag: Flag) -> st.SearchStrategy[Any]:
    one = items(flag)
    if flag.shape.many:
        return st.lists(one, min_size=1, max_size=4).map(tuple)
    return one | st.none() if flag.shape.optional else one


def some_of(flags: FlagSet) -> st.SearchStrategy[dict[str, Any]]:
    required = {name: settings(flag) for name, flag in flags.flags.items() if flag.required}
    others = {name: settings(flag) for name, flag in flags.flags.items() if not flag.required}
    return st.fixed_dictionaries(required, optional=others)


def as_argv(values: dict[str, Any], *, equals: bool, hyphens: bool) -> list[str]:
    argv = []
    for name, value in values.items():
        first, *rest = as_texts(value)
        flag = f"--{name.replace('_', '-') if hyphens else name}"
        argv += [f"{flag}={first}", *rest] if equals else [flag, first, *rest]
    return argv


def check(flags: FlagSet, values: dict[str, Any], equals: bool, hyphens: bool) -> None:
    parsed = flags.parse(as_argv(values, equals=equals, hyphens=hyphens))
    defaults = {name: flag.default for name, flag in flags.flags.items() if not flag.required}
    assert parsed.values == defaults | values
    assert parsed.given == values.keys()


@given(some_of(TRAIN), st.booleans(), st.booleans())
def test_train(values: dict[str, Any], equals: bool, hyphens: bool) -> None:
    check(TRAIN, values, equals, hyphens)


@given(some_of(ROLLOUT), st.booleans(), st.booleans())
def test_rollout(values: dict[str, Any], equals: bool, hyphens: bool) -> None:
    check(ROLLOUT, values, equals, hyphens)


@given(st.lists(st.text(max_size=12) | st.sampled_from(["--model", "--port", "--port=1", "--dry_run", "8000"])))
def test_any_words_give_settings_or_a_message(argv: list[str]) -> None:
    try:
        ROLLOUT.parse(argv)
    except UserError as error:
        told = bool(str(error))
    else:
        told = True
    assert told, "an error without a message"
