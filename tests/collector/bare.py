"""Servers with nothing behind them, for tests of what is known about servers."""

from types import SimpleNamespace
from typing import Any

import msgspec

from outrider.collector.server import Server
from outrider.contract.control import ServerInfo

INFO = ServerInfo(
    engine="torch", engine_version="0", model="model", model_fingerprint="", tokenizer_hash="", torch_dtype="float32",
    max_model_len=256, max_num_seqs=8, vocab_size=99, version=0, run_id="", host="elsewhere",
    capabilities=("inflight_keep",),
)  # fmt: skip


def bare_server(limit: int = 8) -> Server:
    """A server that has not been reached yet."""
    client: Any = SimpleNamespace(url="http://server")
    return Server(client, limit=limit)


def change(server: Server, kind: str, figure: int) -> None:
    """One of the things that happen to a server; what figure means depends on it."""
    match kind:
        case "occupy":
            server.occupy(figure)
        case "vacate":
            server.vacate(min(figure, server.running))
        case "up":
            server.up(INFO)
        case "down":
            server.down()
        case "holds":
            server.holds(figure)
        case "doubt":
            server.doubt()
        case "trust":
            server.trust()
        case "drain":
            server.describe(msgspec.structs.replace(INFO, draining=figure > 2))
