"""A configuration fit to be shown to others."""

from collections.abc import Mapping
from typing import Any

import msgspec

_SECRET_ENDINGS = ("api_key", "password", "secret")


def without_secrets(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """``configuration`` in plain types, keys and passwords replaced by ``(hidden)`` where they are set."""
    plain = msgspec.to_builtins(configuration, enc_hook=str)
    shown = _hide(plain)
    assert isinstance(shown, dict)
    return shown


def _hide(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: "(hidden)" if item and _is_secret(str(key)) else _hide(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(item) for item in value]
    return value


def _is_secret(name: str) -> bool:
    return name.lower().endswith(_SECRET_ENDINGS)
