"""What is wrong with a body: the field, everything it may be, and what was found instead."""

import difflib
import re
import types
from collections.abc import Iterable
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import inspect

from outrider.server.engine import InvalidRequest

#: One step of a path as msgspec writes it: a field, the place in a list, or some value of an object.
_STEP = re.compile(r"\.(?P<field>[^.\[]+)|\[(?P<place>\d+|\.\.\.)\]")

#: Characters of an offending value that are repeated.
_SHOWN = 60


def complaint(error: msgspec.ValidationError, data: bytes | bytearray, kind: type) -> InvalidRequest:
    """The refusal of ``data``, which is JSON but, says ``error``, no ``kind``."""
    problem, _, path = str(error).partition(" - at `$")
    path = path.rstrip("`")
    expected, found, where = kind, msgspec.Raw(data), path.removeprefix(".")
    for step in _STEP.finditer(path):
        expected, found = _enter(expected, found, step)
    where = where.removesuffix("[...]")
    if named := re.match(r"Object (contains unknown|missing required) field `(.*)`$", problem):
        field = f"{where}.{named[2]}" if where else named[2]
        if named[1] == "missing required":
            return InvalidRequest(f"{field}: is missing; it must be {_may_be(_field(expected, named[2]))}", field)
        return InvalidRequest(f"{field}: unknown field; {_advice(named[2], expected)}", field)
    return InvalidRequest(f"{where or 'the body'}: must be {_may_be(expected)}, got {_shown(found)}", where or None)


def _enter(expected: Any, found: msgspec.Raw, step: re.Match[str]) -> tuple[Any, msgspec.Raw]:
    """Type and value one step further down."""
    if field := step["field"]:
        return _field(expected, field), msgspec.json.decode(found, type=dict[str, msgspec.Raw])[field]
    if step["place"] != "...":
        place = int(step["place"])
        return _item(expected, place), msgspec.json.decode(found, type=list[msgspec.Raw])[place]
    [value_type] = [get_args(each)[1] for each in _alternatives(expected) if get_origin(each) is dict]
    values = msgspec.json.decode(found, type=dict[str, msgspec.Raw]).values()
    return value_type, next(value for value in values if not _fits(value, value_type))


def _fits(value: msgspec.Raw, expected: Any) -> bool:
    try:
        msgspec.json.decode(value, type=expected)
    except msgspec.ValidationError:
        return False
    return True


def _field(expected: Any, name: str) -> Any:
    return get_type_hints(_struct(expected), include_extras=True)[name]


def _struct(expected: Any) -> Any:
    """The structure among the alternatives."""
    return next(each for each in _alternatives(expected) if isinstance(each, type) and issubclass(each, msgspec.Struct))


def _item(expected: Any, place: int) -> Any:
    """Type of an item of the list among the alternatives."""
    [items] = [get_args(each) for each in _alternatives(expected) if get_origin(each) in (list, tuple)]
    return items[min(place, len(items) - 1)] if items[-1] is not Ellipsis else items[0]


def _alternatives(expected: Any) -> Iterable[Any]:
    """The members of a union, without their metadata."""
    if get_origin(expected) is Annotated:
        expected = expected.__origin__
    if get_origin(expected) in (Union, types.UnionType):
        for member in get_args(expected):
            yield from _alternatives(member)
    else:
        yield expected


def _advice(name: str, expected: Any) -> str:
    known = _struct(expected).__struct_fields__
    similar = difflib.get_close_matches(name, known, 1)
    return f"did you mean {similar[0]}?" if similar else f"leave it out; the fields are {', '.join(known)}"


def _may_be(expected: Any) -> str:
    """Everything that a field may be, in words."""
    return _words(inspect.type_info(expected))


def _words(node: inspect.Type) -> str:
    match node:
        case inspect.IntType():
            return "an integer" + _range(node.ge, node.gt, node.le, node.lt)
        case inspect.FloatType():
            return "a number" + _range(node.ge, node.gt, node.le, node.lt)
        case inspect.StrType():
            return "a text" + _length(node.min_length, node.max_length, "characters")
        case inspect.BoolType():
            return "true or false"
        case inspect.NoneType():
            return "null"
        case inspect.LiteralType():
            return " or ".join(msgspec.json.encode(value).decode() for value in node.values)
        case inspect.ListType() | inspect.VarTupleType():
            return "a list" + _length(node.min_length, node.max_length, "items")
        case inspect.TupleType():
            return f"a list of {len(node.item_types)} items"
        case inspect.UnionType():
            return " or ".join(map(_words, node.types))
        case _:
            return "an object"


def _range(ge: float | None, gt: float | None, le: float | None, lt: float | None) -> str:
    if ge is not None and le is not None:
        return f" between {_number(ge)} and {_number(le)}"
    bounds = (("of at least", ge), ("greater than", gt), ("at most", le), ("less than", lt))
    words = " and ".join(f"{word} {_number(bound)}" for word, bound in bounds if bound is not None)
    return f" {words}" if words else ""


def _length(least: int | None, most: int | None, unit: str) -> str:
    if least and most is not None:
        return f" of {least} to {most} {unit}"
    if most is not None:
        return f" of at most {most} {unit}"
    return "" if not least else f" of at least {least} {unit}" if least > 1 else " that is not empty"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _shown(value: msgspec.Raw) -> str:
    """A value as the client wrote it, or how long it is."""
    text = bytes(value).strip()
    if text[:1] == b"[":
        return f"a list of {len(msgspec.json.decode(text, type=list[msgspec.Raw]))} items"
    if text[:1] == b"{":
        return "an object"
    shown = text[:_SHOWN].decode(errors="replace")
    return shown if len(text) <= _SHOWN else f"{shown}…"
