"""A curve drawn with block characters."""

import math
from collections.abc import Sequence
from itertools import pairwise

from outrider.observe.figures import mean

_BLOCKS = " ▁▂▃▄▅▆▇█"
_STEPS = len(_BLOCKS) - 1


def sparkline(values: Sequence[float], width: int, height: int = 1) -> list[str]:
    """``height`` lines of at most ``width`` characters, the newest value on the right.

    The lowest value touches the bottom and the highest the top. More values than columns are averaged into
    columns; a value that is not finite leaves its column empty.
    """
    columns = _columns(values, width)
    finite = [value for value in columns if math.isfinite(value)]
    if not finite or height < 1:
        return [" " * len(columns)] * max(height, 0)
    low, high = min(finite), max(finite)
    levels = [_level(value, low, high, height) for value in columns]
    return [
        "".join(_BLOCKS[min(max(level - row * _STEPS, 0), _STEPS)] for level in levels)
        for row in range(height - 1, -1, -1)
    ]


def bar(share: float, width: int) -> tuple[str, str]:
    """A bar of ``width`` characters, as its full part and its empty part."""
    full = round(min(max(share, 0.0), 1.0) * width) if math.isfinite(share) else 0
    return "━" * full, "─" * (width - full)


def stacked(shares: Sequence[float], width: int) -> list[int]:
    """How many of ``width`` characters each part of a whole gets; none at all if there is no whole."""
    kept = [share if 0 < share < math.inf else 0.0 for share in shares]
    whole = sum(kept)
    if not 0 < whole < math.inf:
        return [0] * len(kept)
    exact = [share / whole * width for share in kept]
    cells = [int(size) for size in exact]
    for index in sorted(range(len(cells)), key=lambda index: cells[index] - exact[index])[: width - sum(cells)]:
        cells[index] += 1
    return cells


def _columns(values: Sequence[float], width: int) -> list[float]:
    if len(values) <= width:
        return list(values)
    edges = [round(column * len(values) / width) for column in range(width + 1)]
    return [mean(values[start:end]) for start, end in pairwise(edges)]


def _level(value: float, low: float, high: float, height: int) -> int:
    """Height of a column in eighths of a character, at least 1 so that the lowest value can be seen."""
    if not math.isfinite(value):
        return 0
    # Halved, so that the span of the largest floats does not overflow.
    span = high / 2 - low / 2
    share = (value / 2 - low / 2) / span if span > 0 else 0.5
    return 1 + round(share * (height * _STEPS - 1))
