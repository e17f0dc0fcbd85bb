"""Messages between the collector and the trainer, over one ZeroMQ pair, encoded with MessagePack.

Arrays travel as raw bytes inside the message, see ``contract.arrays``.
"""

from typing import TypeAlias

import msgspec

from outrider.contract.arrays import FloatArray, IntArray
from outrider.contract.control import ServerInfo
from outrider.contract.manifest import DTypeName, Manifest


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
    """What the collector knows of a batch and the trainer logs. Rates and seconds are since the last batch.

    batch_seconds: wall clock since the last batch shipped. It is the sum of three means over the servers:
    generation_busy_seconds: with rollouts in flight. generation_idle_seconds: up, and nothing in flight, because the
    staleness bound or the data admits nothing. generation_down_seconds: not up, draining, or without weights of this
    run yet. generation_idle_share: the share of the second and the third.

    The others overlap with these and with each other. reward_seconds: computing, summed over all calls.
    reward_wait_seconds: wall clock with nothing in flight on any server and rewards still running. stage_seconds,
    commit_seconds: of fetching weights and of switching to them, summed over the servers. pack_seconds: from the choice
    of the batch to its shipping, which is advantages, the ledger's answer and packing.
    """

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
    batch_seconds: float
    generation_busy_seconds: float
    generation_idle_seconds: float
    generation_down_seconds: float
    generation_idle_share: float
    reward_seconds: float
    reward_wait_seconds: float
    stage_seconds: float
    commit_seconds: float
    pack_seconds: float
    epoch: float


class MiniBatch(msgspec.Struct, kw_only=True):
    """The rollouts of one optimizer step.

    samples: groups with signal only. sequences and tokens: of the whole mini-batch, the zero-variance groups counted
    in, whose gradient is exactly zero: they cost no compute, yet the normalization is as if they had been trained.
    """

    samples: list[Sample]
    sequences: int
    tokens: int


class Batch(msgspec.Struct, kw_only=True, tag="batch"):
    """Rollouts that were generated together, in the mini-batches in which they are trained.

    number: of the batch, counted from 0; it is the version that the batch trains, and its training makes the next.
    """

    number: int
    mini_batches: list[MiniBatch]
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

    serving_dtype: precision in which weights are to be published. ledger: id of the ledger, for checkpoints to name it.
    """

    servers: list[ServerInfo]
    serving_dtype: DTypeName
    prompts: int
    evaluation_prompts: int
    segment_url: str
    ledger: str


class Reached(msgspec.Struct, kw_only=True, tag="reached"):
    """Every server can fetch weights from every node that it has been asked to."""


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
    """Start to collect the batches from number ``first`` up to, not including, ``end``."""

    first: int
    end: int


class Kept(msgspec.Struct, kw_only=True, tag="kept"):
    """No checkpoint is older than the one from which a run goes on with ``step``: the ledger may give up what was
    before."""

    step: int


class WeightNode(msgspec.Struct, kw_only=True):
    """A trainer's node. host: which memory it has; name: for people; url: where it serves its segments."""

    node: int
    host: str
    name: str
    url: str


class Reach(msgspec.Struct, kw_only=True, tag="reach"):
    """Find out whether servers can fetch weights from these nodes; answered by Reached, or Failure."""

    nodes: list[WeightNode]


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


FromCollector: TypeAlias = Ready | Reached | Batch | EvalResult | PoolStatus | Notice | Failure
FromTrainer: TypeAlias = Begin | Kept | Reach | Published | EvaluateRequest | Stop
