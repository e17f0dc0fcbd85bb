"""Which replica gets a request: where its prefix is warm, unless another one has clearly less to do."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import xxhash

from outrider.contract.arrays import IntArray
from outrider.server.torch_engine.cache import BLOCK

#: A prefix of so many blocks names a request's home.
HOME_BLOCKS = 4
#: How many more tokens the home may work on than the least loaded replica, and how many times as many.
SLACK_TOKENS, SLACK_FACTOR = 1024, 1.25


class Loaded(Protocol):
    """A replica with its load."""

    @property
    def tokens(self) -> int: ...


Candidate = TypeVar("Candidate", bound=Loaded)


def choose_replica(ready: Sequence[Candidate], home: Candidate | None) -> Candidate:
    """One of ``ready``: the home, where the prefix is cached, as long as it is about as free as the least loaded."""
    least = min(ready, key=lambda replica: replica.tokens)
    if home is not None and home in ready and home.tokens <= SLACK_FACTOR * least.tokens + SLACK_TOKENS:
        return home
    return least


def prefix_key(prompt: IntArray) -> int:
    """Names what a prompt begins with."""
    return xxhash.xxh3_64_intdigest(prompt[: 4 * BLOCK * HOME_BLOCKS])
