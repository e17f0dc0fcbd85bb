"""From sections of configuration to a command line.

A :class:`FlagSet` is derived from :class:`Section` classes: their fields are the flags, and nothing about a flag is
said anywhere else. Parsing has two halves. :meth:`FlagSet.collect` finds what was given, on the command line and in
``--config``; :meth:`FlagSet.convert` makes typed values of it. In between, the ``swift`` command takes out what
belongs to ms-swift alone.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_type_hints

import msgspec

from outrider.cli.config_file import read_config_file
from outrider.cli.values import Shape, ValueProblem
from outrider.contract.errors import UserError
from outrider.contract.options import Section

_FLAG = re.compile(r"--([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)
_CONFIG = "config"

AnySection = TypeVar("AnySection", bound=Section)


class Flag(msgspec.Struct, frozen=True, kw_only=True):
    """One flag. default: NODEFAULT where the flag has to be given."""

    name: str
    aliases: tuple[str, ...]
    help: str
    shape: Shape
    default: Any

    @property
    def required(self) -> bool:
        return self.default is msgspec.NODEFAULT


class Given(msgspec.Struct, frozen=True):
    """A flag as it was given. name: with underscores; place: the file and line, or "" for the command line."""

    name: str
    written: str
    values: tuple[str, ...]
    place: str = ""

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"{self.place}: {self.written}" if self.place else self.written

    def __str__(self) -> str:
        return " ".join((self.label, *self.values))


class Parsed(msgspec.Struct, frozen=True):
    """Typed values by flag, and the names of those that were given rather than left to their default."""

    values: dict[str, Any]
    given: frozenset[str]

    def section(self, kind: type[AnySection]) -> AnySection:
        """The section with these values."""
        return kind(**{name: self.values[name] for name in kind.__struct_fields__ if name in self.values})


class FlagSet:
    """The flags of one command. hints: for names that are not flags here, what to do instead."""

    def __init__(
        self, command: str, about: str, sections: Sequence[type[Section]], hints: Mapping[str, str] | None = None
    ) -> None:
        self.command = command
        self.about = about
        self.groups = {kind: flags_of(kind) for kind in sections}
        self.flags = {flag.name: flag for flags in self.groups.values() for flag in flags}
        self._hints = {_CONFIG: "a file cannot name another one", **(hints or {})}
        self._canonical = {name: flag.name for flag in self.flags.values() for name in (flag.name, *flag.aliases)}
        names = [name for flags in self.groups.values() for flag in flags for name in (flag.name, *flag.aliases)]
        if len(set(names)) != len(names):
            raise ValueError(f"{command}: declared twice: {sorted({name for name in names if names.count(name) > 1})}")

    def parse(self, argv: Sequence[str]) -> Parsed:
        """Values of a command line. UserError where something is wrong with it."""
        return self.convert(self.collect(argv))

    def collect(self, argv: Sequence[str]) -> dict[str, Given]:
        """What was given, by canonical name; flags win over the file. Names unknown here are still among it."""
        line = self._by_name(_scan(argv))
        config = line.pop(_CONFIG, None)
        if config is None:
            return line
        if len(config.values) != 1:
            raise UserError(f"--config takes the name of one file, found {len(config.values)}")
        entries = read_config_file(config.values[0])
        return self._by_name(Given(_name(e.key), e.key, e.values, e.place) for e in entries) | line

    def convert(self, given: Mapping[str, Given]) -> Parsed:
        """Typed values of what was given. UserError names every unknown, wrong and missing flag at once."""
        problems = [self._unknown(item) for name, item in given.items() if name not in self.flags]
        values = {name: flag.default for name, flag in self.flags.items() if not flag.required}
        for name, item in given.items():
            if name in self.flags:
                try:
                    values[name] = self._value(self.flags[name], item)
                except ValueProblem as problem:
                    problems.append(f"{item.label} {problem}")
        problems += [
            f"--{flag.name} is missing: {flag.help}"
            for flag in self.flags.values()
            if flag.required and flag.name not in given
        ]
        if problems:
            raise UserError("\n".join(problems))
        return Parsed(values, frozenset(given))

    def _value(self, flag: Flag, item: Given) -> Any:
        if item.values or (flag.shape.many and item.place):
            return flag.shape.parse(item.values)
        if flag.shape.is_bool and not item.place:
            return True
        raise ValueProblem(f"needs a value: {flag.shape.expected}")

    def _unknown(self, item: Given) -> str:
        if item.name in self._hints:
            return f"{item.label} is not a flag of {self.command}: {self._hints[item.name]}"
        near = difflib.get_close_matches(item.name, [*self._canonical, _CONFIG], n=1)
        remedy = f"did you mean --{near[0]}?" if near else f"'{self.command} --help' lists the flags"
        return f"{item.label} is not a flag of {self.command}: {remedy}"

    def _by_name(self, items: Iterable[Given]) -> dict[str, Given]:
        found: dict[str, Given] = {}
        for item in items:
            name = self._canonical.get(item.name, item.name)
            if name in found:
                both = f"'{found[name]}' and '{item}'"
                raise UserError(f"--{name} is given twice, as {both}: give it once, with all its values after it")
            found[name] = item
        return found


def flags_of(section: type[Section]) -> tuple[Flag, ...]:
    """The flags that a section declares, in its order."""
    hints = get_type_hints(section, include_extras=True)
    return tuple(_flag(field, hints[field.name]) for field in msgspec.structs.fields(section))


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether ``--help`` or ``-h`` is among the words."""
    return "--help" in argv or "-h" in argv


def _flag(field: msgspec.structs.FieldInfo, annotation: Any) -> Flag:
    meta = annotation.__metadata__[0]
    default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    return Flag(
        name=field.name,
        aliases=(meta.extra or {}).get("aliases", ()),
        help=meta.description or "",
        shape=Shape.of(annotation),
        default=default,
    )


def _scan(argv: Sequence[str]) -> list[Given]:
    """Flags with the words after each. A word is a flag if it is ``--name`` or ``--name=...``, so -1 is a value."""
    found: list[tuple[str, list[str]]] = []
    for word in argv:
        if match := _FLAG.fullmatch(word):
            found.append((match[1], [] if match[2] is None else [match[2]]))
        elif found:
            found[-1][1].append(word)
        else:
            raise UserError(f"{word!r} follows no flag: expected --flag value, as in --model {word}")
    return [Given(_name(written), f"--{written}", tuple(values)) for written, values in found]


def _name(written: str) -> str:
    return written.replace("-", "_")
