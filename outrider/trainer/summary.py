"""``summary.json``: how a run ended, for whoever started it. Imports no torch."""

import msgspec


class RunEnd(msgspec.Struct, kw_only=True):
    """How a run ended. train_seconds: from the first launch of a rollout to the end of the last step."""

    finished: bool
    steps: int
    max_steps: int
    train_seconds: float
    max_staleness: int


class Summary(msgspec.Struct, kw_only=True):
    """``summary.json``. accuracy: held-out reward before and after, None where nothing was evaluated."""

    finished: bool
    steps: int
    train_seconds: float
    max_staleness: int
    max_staleness_seen: int
    reward_before: float | None
    reward_after: float | None
    examples_before: list[tuple[str, str, float]]
    examples_after: list[tuple[str, str, float]]
