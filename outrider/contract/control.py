"""The control plane under ``/outrider``: who a server is, and how its weights change."""

from typing import Literal

import msgspec

from outrider.contract.manifest import Manifest

EngineName = Literal["torch", "vllm"]
StageState = Literal["idle", "staging", "staged", "failed"]

#: What happens to requests in flight when a version is committed. keep: they go on with their keys and values.
#: recompute: their keys and values are made anew with the new weights, their tokens stay. wait: the commit waits for
#: them, and no others start meanwhile.
Inflight = Literal["keep", "recompute", "wait"]


class ServerInfo(msgspec.Struct, kw_only=True):
    """Answer of ``GET /outrider/info``.

    version and run_id: of the weights in use; run_id is empty while these are the weights the server started
    with. tokenizer_hash: see ``outrider.contract.identity``. max_num_seqs: sequences decoded at once.
    """

    engine: EngineName
    engine_version: str
    model: str
    model_fingerprint: str
    tokenizer_hash: str
    torch_dtype: str
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    version: int
    run_id: str
    host: str
    draining: bool = False
    capabilities: tuple[str, ...] = ()


class StageRequest(msgspec.Struct, kw_only=True):
    """Body of ``POST /outrider/weights/stage``: fetch this version beside the weights in use."""

    manifest: Manifest


class CommitRequest(msgspec.Struct, kw_only=True):
    """Body of ``POST /outrider/weights/commit``: switch to the staged version between two engine steps."""

    run_id: str
    version: int
    inflight: Inflight = "keep"


class WeightStatus(msgspec.Struct, kw_only=True):
    """Answer of the three weight routes. Seconds are those of the latest stage and commit."""

    version: int
    run_id: str
    state: StageState
    staged_version: int | None = None
    error: str | None = None
    stage_seconds: float = 0.0
    commit_seconds: float = 0.0


class ReachRequest(msgspec.Struct, kw_only=True):
    """Body of ``POST /outrider/weights/reach``: could weights of this run be fetched from a node of the trainer?
    url: where the node serves segments."""

    url: str
    run_id: str


class ReachAnswer(msgspec.Struct, kw_only=True):
    """Its answer. problem: why they could not."""

    problem: str | None


class DrainStatus(msgspec.Struct, kw_only=True):
    """Answer of ``POST /outrider/drain``: the server takes no new request; ``running`` are still being served."""

    draining: bool
    running: int
