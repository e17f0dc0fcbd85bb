"""Whether all processes of a run were started with the same parameters: with others it would be another run."""

import msgspec

from outrider.contract.errors import UserError
from outrider.trainer.ranks import Ranks


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
