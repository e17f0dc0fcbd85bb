"""Whether all processes of a run were started alike: with other parameters it would be another run, and all of them
write their part of a checkpoint into one directory."""

import time
import uuid
from pathlib import Path

import msgspec

from outrider.contract.errors import UserError
from outrider.trainer.ranks import Ranks

#: Seconds for a file that one host has made to be seen on another: network file systems remember what was not there.
VISIBLE = 10.0


class Said(msgspec.Struct):
    """One rank's parameters, and where it runs."""

    node: int
    rank: int
    settings: dict[str, object]


def compare_settings(ranks: Ranks, settings: dict[str, object]) -> None:
    """Raises UserError on every rank where two of them differ, naming node, parameter and both values."""
    mine = Said(ranks.node, ranks.rank, settings)
    first, *others = (msgspec.json.decode(said, type=Said) for said in ranks.gather(msgspec.json.encode(mine)))
    for other in others:
        for name in sorted(first.settings.keys() | other.settings.keys()):
            here, there = first.settings.get(name), other.settings.get(name)
            if here != there and ranks.local_rank > 0:
                raise SystemExit(2)  # the first rank of the node says it
            if here != there:
                if name.endswith("api_key"):
                    here, there = "another one", "one"
                raise UserError(
                    f"--{name} is {there} on node {other.node} (rank {other.rank}) and {here} on node {first.node} "
                    "(rank 0): start all nodes with the same parameters"
                )


class Seen(msgspec.Struct):
    """Whether a rank finds the directory of rank 0, and under which path it looked."""

    node: int
    rank: int
    path: str
    found: bool


def check_directory(ranks: Ranks, directory: Path) -> None:
    """Raises UserError on every rank where ``directory`` is not the same one for all of them."""
    if ranks.size == 1:
        return
    token = directory / f".shared-{uuid.uuid4().hex}"
    if ranks.leads:
        token.touch()
    try:
        name = ranks.gather(token.name.encode())[0].decode()
        until = time.monotonic() + VISIBLE
        while not (found := (directory / name).exists()) and time.monotonic() < until:
            time.sleep(0.2)
        mine = Seen(ranks.node, ranks.rank, str(directory.absolute()), found)
        said = [msgspec.json.decode(seen, type=Seen) for seen in ranks.gather(msgspec.json.encode(mine))]
    finally:
        token.unlink(missing_ok=True)
    for other in said:
        if not other.found and ranks.local_rank > 0:
            raise SystemExit(2)  # the first rank of the node says it
        if not other.found:
            raise UserError(
                f"--output_dir {other.path} on node {other.node} (rank {other.rank}) is not {said[0].path} on node 0: "
                "every rank writes its part of a checkpoint there; give a directory that all nodes share"
            )
