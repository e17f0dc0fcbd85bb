"""Messages between the server's front process and a replica, over one ZeroMQ pair, encoded with MessagePack."""

from typing import TypeAlias

import msgspec

from outrider.contract.arrays import FloatArray, IntArray
from outrider.contract.control import Inflight
from outrider.contract.generation import VersionSpan
from outrider.contract.sampling import SamplingParams
from outrider.server.engine import ChoiceDelta


class ReplicaSpec(msgspec.Struct, kw_only=True, frozen=True):
    """What a replica is told at its birth. device: as torch names it. threads: 0 leaves the number to torch.

    cache_positions: tokens that all its sequences together may keep in the cache; prefix_blocks: of the prefix cache.
    """

    name: str
    model: str
    dtype: str
    device: str
    threads: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    cache_positions: int
    prefix_blocks: int
    stop_tokens: tuple[int, ...]


class Progress(msgspec.Struct, kw_only=True):
    """Tokens that one choice already has, for a request that goes on on another replica."""

    token_ids: IntArray = b""
    logprobs: FloatArray = b""
    versions: list[VersionSpan] = []
    ended: bool = False


class Submit(msgspec.Struct, kw_only=True, tag="submit"):
    """Sample ``n`` completions. request: the front's number for it. progress: empty, or one entry a choice."""

    request: int
    prompt: IntArray
    sampling: SamplingParams
    n: int
    seed: int
    stream: bool
    progress: list[Progress] = []


class Abort(msgspec.Struct, kw_only=True, tag="abort"):
    """End a request, or one choice of it. silent: nobody waits for its last deltas."""

    request: int
    index: int | None = None
    silent: bool = True


class TensorPlace(msgspec.Struct, kw_only=True, frozen=True):
    """Where a tensor lies in a host buffer, in the serving precision."""

    name: str
    shape: tuple[int, ...]
    offset: int


class Stage(msgspec.Struct, kw_only=True, tag="stage"):
    """Get the version in the host buffer at ``path`` ready beside the weights in use."""

    path: str
    length: int
    places: list[TensorPlace]


class Commit(msgspec.Struct, kw_only=True, tag="commit"):
    """Use what was staged last, as ``version``."""

    version: int
    inflight: Inflight


class Quit(msgspec.Struct, kw_only=True, tag="quit"):
    """End the process."""


class Hello(msgspec.Struct, kw_only=True, tag="hello"):
    """The replica has loaded its model. tensors: name and shape of every parameter."""

    tensors: list[tuple[str, tuple[int, ...]]]
    vocab_size: int


class Load(msgspec.Struct, kw_only=True):
    """State and counters of a replica. tokens: in the cache, of running sequences; idle_seconds: without work."""

    running: int = 0
    waiting: int = 0
    tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    cache_usage: float = 0.0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    idle_seconds: float = 0.0


class Update(msgspec.Struct, kw_only=True):
    """News of one request: tokens of a choice, or why it cannot be finished."""

    request: int
    delta: ChoiceDelta | None = None
    failure: str | None = None


class Step(msgspec.Struct, kw_only=True, tag="step"):
    """What the latest steps brought."""

    updates: list[Update]
    load: Load


class Staged(msgspec.Struct, kw_only=True, tag="staged"):
    """A stage has ended; error: why the version cannot be used."""

    error: str | None = None


class Committed(msgspec.Struct, kw_only=True, tag="committed"):
    """A commit has taken place. seconds: that the engine stood still for it."""

    version: int
    seconds: float


class Crashed(msgspec.Struct, kw_only=True, tag="crashed"):
    """The last words of a replica. user_error: the user can mend it (a model that cannot be loaded)."""

    message: str
    user_error: bool = False


FromFront: TypeAlias = Submit | Abort | Stage | Commit | Quit
FromReplica: TypeAlias = Hello | Step | Staged | Committed | Crashed
