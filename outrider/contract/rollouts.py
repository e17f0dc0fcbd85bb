"""A rollout as the ledger keeps it and as ``outrider show`` prints it."""

import msgspec

from outrider.contract.generation import VersionSpan


class RolloutRow(msgspec.Struct, kw_only=True):
    """One rollout of the ledger. step: the batch with which it was trained (counted from 1), None if with none.

    state: ``finished`` | ``trained`` | ``dropped``; reason: why it was dropped. tokens: completion length.
    """

    group: int
    index: int
    step: int | None
    state: str
    reason: str | None
    prompt: str
    completion: str
    tokens: int
    reward: float | None
    rewards: dict[str, float | None]
    advantage: float | None
    finish_reason: str
    versions: list[VersionSpan]
    server: str
