"""Reading ``--config``: a flat YAML or TOML file whose keys are flags without their hyphens.

Values stay the text that was written and are read exactly like those of the command line, so that ``lr: 1e-6``,
``panel: on`` and ``report_to: none`` mean what they mean there.
"""

import datetime
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import yaml

from outrider.contract.errors import UserError


class Entry(msgspec.Struct, frozen=True):
    """One key of the file: its texts, and where it stands."""

    key: str
    values: tuple[str, ...]
    place: str


def read_config_file(path: str) -> list[Entry]:
    """The entries of ``path``. UserError where it cannot be read or is not flat."""
    readers = {".yaml": _from_yaml, ".yml": _from_yaml, ".toml": _from_toml}
    suffix = Path(path).suffix.lower()
    if suffix not in readers:
        raise UserError(f"--config {path}: expected a name that ends in .yaml, .yml or .toml, found {suffix!r}")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return readers[suffix](path, text)


def _from_yaml(path: str, text: str) -> list[Entry]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not valid YAML: {error}") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        found = type(root).__name__.removesuffix("Node").lower()
        raise UserError(f"--config {path}: expected lines such as 'max_steps: 100', found a {found}")
    entries = []
    for key, node in root.value:
        place = f"{path}, line {key.start_mark.line + 1}"
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not isinstance(key, yaml.ScalarNode) or not all(isinstance(item, yaml.ScalarNode) for item in nodes):
            raise _not_flat(place, key.value if isinstance(key, yaml.ScalarNode) else "a key")
        entries.append(Entry(key.value, tuple(map(_scalar, nodes)), place))
    return entries


def _scalar(node: yaml.ScalarNode) -> str:
    return "null" if node.tag == "tag:yaml.org,2002:null" else str(node.value)


def _from_toml(path: str, text: str) -> list[Entry]:
    try:
        # Numbers stay text, so that they are read as the command line reads them.
        table = tomllib.loads(text, parse_float=str)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--config {path} is not valid TOML: {error}") from error
    return [Entry(key, _texts(value, path, key), path) for key, value in table.items()]


def _texts(value: Any, path: str, key: str) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | int | datetime.date | datetime.time) for item in items):
        raise _not_flat(path, key)
    return tuple(str(item).lower() if isinstance(item, bool) else str(item) for item in items)


def _not_flat(place: str, key: str) -> UserError:
    return UserError(
        f"{place}: {key} holds a table or a list of lists; the file is flat, with flags at the top level, "
        "as in 'max_steps: 100' (YAML) or 'max_steps = 100' (TOML)"
    )
