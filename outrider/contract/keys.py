"""Where the API key of this user's servers is found."""

import os
from pathlib import Path

#: Environment variable that holds the key, for servers and for trainers.
KEY_VARIABLE = "OUTRIDER_API_KEY"


def key_file() -> Path:
    """The file in which this user's servers keep their key; only its owner can read it."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "outrider" / "api_key"


def client_key(given: str | None) -> str:
    """The key a client sends: ``given``, else OUTRIDER_API_KEY, else the key file; empty when there is none."""
    key = given or os.environ.get(KEY_VARIABLE)
    if key:
        return key
    try:
        return key_file().read_text().strip()
    except OSError:
        return ""
