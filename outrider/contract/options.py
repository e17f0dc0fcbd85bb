"""How a configuration section is declared: one place for a flag's name, type, bounds, default and help.

A section is a ``msgspec.Struct`` whose fields are ``Annotated[type, option("help", ...)]``. The command line, the
configuration file and ``--help`` are all derived from it, and :func:`msgspec.convert` checks types and bounds.
"""

from typing import Annotated, Literal, TypeAlias

import msgspec

#: Precision of a model; what ``auto`` means is for whoever loads it to say.
DTypeChoice: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]

#: For optional fields, whose bounds have to stand inside the union.
PositiveInt: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]


def option(
    help: str,
    *,
    aliases: tuple[str, ...] = (),
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> msgspec.Meta:
    """Metadata of one flag. aliases: further spellings that users of ms-swift, TRL or vLLM know."""
    bounds = {name: bound for name, bound in (("ge", ge), ("gt", gt), ("le", le), ("lt", lt)) if bound is not None}
    return msgspec.Meta(description=help, extra={"aliases": aliases}, **bounds)  # type: ignore[call-overload]


class Section(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of every configuration section."""
