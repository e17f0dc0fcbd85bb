"""``--help``: one group a section, each flag with its values, default and further spellings."""

import shutil
import textwrap

from outrider.cli.flags import Flag, FlagSet
from outrider.cli.values import as_text

_INDENT = 6


def help_text(flags: FlagSet, width: int | None = None) -> str:
    """Help for ``flags``, as wide as the terminal but 80 to 120 columns."""
    columns = min(max(width or shutil.get_terminal_size().columns, 80), 120)
    lines = [
        f"usage: {flags.command} --flag value ... [--config FILE]",
        "",
        *textwrap.wrap(flags.about, columns),
        "",
        "General:",
        *_entry("--config FILE", "Flat YAML or TOML file of flags; those on the command line win over it", columns),
        *_entry("--help", "Show this and exit", columns),
    ]
    for section, group in flags.groups.items():
        title = (section.__doc__ or section.__name__).strip().splitlines()[0].rstrip(".")
        lines += ["", f"{title}:"]
        for flag in group:
            lines += _entry(f"--{flag.name} {flag.shape.metavar}", _about(flag), columns)
    return "\n".join(lines)


def _entry(head: str, text: str, columns: int) -> list[str]:
    indent = " " * _INDENT
    wrapped = textwrap.wrap(
        text, columns, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    return [f"  {head}", *wrapped]


def _about(flag: Flag) -> str:
    notes = []
    if flag.required:
        notes.append("required")
    elif flag.default not in (None, ()):
        notes.append(f"default: {as_text(flag.default)}")
    if flag.aliases:
        notes.append("also " + ", ".join(f"--{alias}" for alias in flag.aliases))
    return f"{flag.help} [{'; '.join(notes)}]" if notes else flag.help
