"""From the text of a flag to a value of its declared type, and back."""

import math
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import inspect

_NOTHING = ("none", "null")
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class ValueProblem(ValueError):
    """What is wrong with a flag's text, to be put after the flag's name."""


class Shape(msgspec.Struct, frozen=True):
    """What a flag takes: one value of type ``item`` or, with ``many``, several; ``optional`` ones may be none."""

    item: Any
    many: bool
    optional: bool

    @classmethod
    def of(cls, annotation: Any) -> "Shape":
        """The shape of a field declared as ``Annotated[type, option(...)]``."""
        bare = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
        origin, arguments = get_origin(bare), get_args(bare)
        if origin is tuple:
            return cls(item=arguments[0], many=True, optional=False)
        if origin in (Union, types.UnionType):
            (item,) = (argument for argument in arguments if argument is not type(None))
            return cls(item=item, many=False, optional=True)
        return cls(item=annotation, many=False, optional=False)

    @property
    def choices(self) -> tuple[str, ...]:
        """The values allowed, where they are counted."""
        bare = get_args(self.item)[0] if get_origin(self.item) is Annotated else self.item
        return get_args(bare) if get_origin(bare) is Literal else ()

    @property
    def is_bool(self) -> bool:
        """Whether the bare flag means true."""
        return isinstance(self._kind, inspect.BoolType) and not self.many

    @property
    def metavar(self) -> str:
        """The placeholder in ``--help``."""
        match self._kind:
            case inspect.BoolType():
                name = "true|false"
            case inspect.LiteralType():
                name = "|".join(self.choices)
            case inspect.IntType():
                name = "INT"
            case inspect.FloatType():
                name = "NUMBER"
            case _:
                name = "TEXT"
        return f"{name} ..." if self.many else name

    @property
    def expected(self) -> str:
        """What one value has to be, in words."""
        match self._kind:
            case inspect.BoolType():
                words = "true or false"
            case inspect.LiteralType():
                words = "one of " + ", ".join(self.choices) if len(self.choices) > 1 else self.choices[0]
            case inspect.IntType() as kind:
                words = "an integer" + _bounds(kind)
            case inspect.FloatType() as kind:
                words = "a finite number" + _bounds(kind)
            case _:
                words = "text"
        return f"{words}, or none" if self.optional else words

    @property
    def _kind(self) -> inspect.Type:
        info = inspect.type_info(self.item)
        return info.type if isinstance(info, inspect.Metadata) else info

    def parse(self, texts: tuple[str, ...]) -> Any:
        """The value that ``texts`` spell. ValueProblem where they do not."""
        if self.many:
            nothing = len(texts) == 1 and texts[0].lower() in _NOTHING and texts[0] not in self.choices
            return () if nothing else tuple(self._one(text) for text in texts)
        if len(texts) != 1:
            raise ValueProblem(f"takes one value, found {len(texts)}: {' '.join(texts)}")
        if self.optional and texts[0].lower() in _NOTHING and texts[0] not in self.choices:
            return None
        return self._one(texts[0])

    def _one(self, text: str) -> Any:
        kind = self._kind
        if text == "" and not self.optional:
            raise ValueProblem(f"is empty: expected {self.expected}")
        if isinstance(kind, inspect.StrType):
            return text
        if isinstance(kind, inspect.BoolType):
            if text.lower() in _BOOLEANS:
                return _BOOLEANS[text.lower()]
        else:
            try:
                value = msgspec.convert(text, self.item, strict=False)
                if not isinstance(value, float) or math.isfinite(value):
                    return value
            except msgspec.ValidationError:
                pass
        raise ValueProblem(f"is {text!r}: expected {self.expected}")


def _bounds(kind: inspect.IntType | inspect.FloatType) -> str:
    if kind.ge is not None and kind.le is not None:
        return f" from {kind.ge} to {kind.le}"
    limits = ((">=", kind.ge), (">", kind.gt), ("<=", kind.le), ("<", kind.lt))
    words = " and ".join(f"{sign} {limit}" for sign, limit in limits if limit is not None)
    return f" {words}" if words else ""


def as_texts(value: Any) -> tuple[str, ...]:
    """The words that :meth:`Shape.parse` reads back as ``value``. None is ``null``: ``none`` can be a choice."""
    if isinstance(value, tuple):
        return tuple(text for item in value for text in as_texts(item)) or ("null",)
    if value is None:
        return ("null",)
    if isinstance(value, bool):
        return (str(value).lower(),)
    return (str(value),)


def as_text(value: Any) -> str:
    """One line for people."""
    return " ".join(as_texts(value))
