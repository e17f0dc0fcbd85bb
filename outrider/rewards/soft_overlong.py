"""A penalty that grows over the last tokens before the length limit."""

from collections.abc import Sequence
from typing import Any


def soft_overlong(
    completions: list[str],
    *,
    soft_max_length: int,
    soft_cache_length: int,
    completion_ids: Sequence[Sequence[int]],
    **columns: Any,
) -> list[float | None]:
    """min(−(len − (L_max − L_cache)) / L_cache, 0): 0 up to L_max − L_cache tokens, −1 at L_max.

    DAPO's soft overlong punishment (arXiv 2503.14476). L_max is soft_max_length and L_cache
    soft_cache_length, in tokens; len is that of `completion_ids`, so that the text is not
    tokenized again. Beyond L_max it goes on falling, where a completion can be that long.
    """
    free = soft_max_length - soft_cache_length
    return [min((free - len(ids)) / soft_cache_length, 0.0) for ids in completion_ids]
