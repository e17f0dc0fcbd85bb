"""Messages between the collector and the trainer, over one ZeroMQ pair, encoded with MessagePack.

Arrays travel as raw little-endian bytes inside the message (``IntArray``, ``FloatArray``), so that neither side
spends Python time on single tokens.
"""

from typing import Any, TypeAlias

import msgspec
import numpy as np

from outrider.contract.control import ServerInfo
from outrider.contract.generation import VersionSpan
from outrider.contract.manifest import DTypeName, Manifest

IntArray: TypeAlias = bytes
FloatArray: TypeAlias = bytes


def pack_ints(values: Any) -> IntArray:
    """Token ids as bytes of little-endian int32."""
    return np.asarray(values, dtype="<i4").tobytes()


def unpack_ints(data: IntArray) -> np.ndarray:
    """Inverse of :func:`pack_ints`; int32 [n]."""
    return np.frombuffer(data, dtype="<i4")


def pack_floats(values: Any) -> FloatArray:
    """Log-probabilities as bytes of little-endian float32."""
    return np.asarray(values, dtype="<f4").tobytes()


def unpack_floats(data: FloatArray) -> np.ndarray:
    """Inverse of :func:`pack_floats`; float32 [n]."""
    return np.frombuffer(data, dtype="<f4")


class Sample(msgspec.Struct, kw_only=True):
    """One rollout as the trainer needs it. ``completion``, ``logprobs`` and ``mask`` have one entry a token.

    mask: 1 where the token was sampled by the policy (and is trained), 0 where an environment wrote it;
    empty bytes mean all ones.
    """

    group: int
    prompt: IntArray
    completion: IntArray
    logprobs: FloatArray
    advantage: float
    mask: bytes = b""


class BatchStats(msgspec.Struct, kw_only=True):
    """What the collector knows of a batch and the trainer logs. Rates and seconds are since the last batch."""

    reward: float
    reward_std: float
    rewards: dict[str, float]
    completion_length: float
    completion_length_max: int
    truncated_share: float
    staleness_mean: float
    staleness_max: int
    groups: int
    groups_zero_variance: int
    groups_failed: int
    groups_stale: int
    prompts_rejected: int
    rollout_tokens: int
    generation_idle_share: float
    reward_seconds: float
    stage_seconds: float
    commit_seconds: float
    epoch: float


class Batch(msgspec.Struct, kw_only=True, tag="batch"):
    """The rollouts of one optimizer step.

    samples: groups with signal only. sequences and tokens: of the whole batch, the zero-variance groups counted
    in, whose gradient is exactly zero: they cost no compute, yet the normalization is as if they had been trained.
    """

    step: int
    samples: list[Sample]
    sequences: int
    tokens: int
    stats: BatchStats


class EvalFigures(msgspec.Struct, kw_only=True):
    """Held-out results after ``step``, whose tokens were sampled with versions ``version_min`` to ``version_max``.

    count: completions scored; failed: prompts that could not be; reward: weighted mean; seconds: it took.
    """

    step: int
    version_min: int
    version_max: int
    count: int
    failed: int
    rewards: dict[str, float]
    reward: float
    completion_length: float
    seconds: float


class EvalExample(msgspec.Struct, kw_only=True):
    """One held-out prompt and its completion."""

    prompt: str
    completion: str
    reward: float


class EvalResult(EvalFigures, kw_only=True, tag="evaluation"):
    """The answer to an ``EvaluateRequest``."""

    examples: list[EvalExample]


class Ready(msgspec.Struct, kw_only=True, tag="ready"):
    """The collector has found the servers and the data in order. ``segment_url`` serves this host's segments.

    serving_dtype: precision in which weights are to be published.
    """

    servers: list[ServerInfo]
    serving_dtype: DTypeName
    prompts: int
    evaluation_prompts: int
    segment_url: str


class PoolStatus(msgspec.Struct, kw_only=True, tag="pool"):
    """What the collector does right now; sent about twice a second for the panel."""

    servers_alive: int
    servers_total: int
    server_versions: list[int]
    groups_running: int
    groups_finished: int
    rollouts_running: int
    tokens_per_second: float
    generation_idle_share: float


class Notice(msgspec.Struct, kw_only=True, tag="notice"):
    """Something the user should know: a server lost or back, a group given up."""

    text: str


class Failure(msgspec.Struct, kw_only=True, tag="failure"):
    """The collector cannot go on; ``message`` is for the user."""

    message: str


class Begin(msgspec.Struct, kw_only=True, tag="begin"):
    """Start to collect for the steps from ``start_step`` up to, not including, ``max_steps``."""

    start_step: int
    max_steps: int


class Published(msgspec.Struct, kw_only=True, tag="published"):
    """A version is ready to be staged by the servers."""

    manifest: Manifest


class EvaluateRequest(msgspec.Struct, kw_only=True, tag="evaluate"):
    """Evaluate on the held-out set once every server holds at least ``version``; answered by EvalResult."""

    step: int
    version: int


class Stop(msgspec.Struct, kw_only=True, tag="stop"):
    """End in order: abort what is in flight, close the ledger, exit."""

    reason: str


FromCollector: TypeAlias = Ready | Batch | EvalResult | PoolStatus | Notice | Failure
FromTrainer: TypeAlias = Begin | Published | EvaluateRequest | Stop


def version_span_array(spans: list[VersionSpan]) -> np.ndarray:
    """Expand run-length versions to one int64 a token."""
    if not spans:
        return np.zeros(0, dtype=np.int64)
    versions, counts = zip(*spans, strict=True)
    return np.repeat(np.asarray(versions, dtype=np.int64), counts)
