"""Numbers as people read them. Every function takes any float, nan and infinities included."""

import math
from collections.abc import Iterable, Sequence


def number(value: float) -> str:
    """Three significant digits: ``0.713``, ``12,345``, ``1.2e-06``, ``nan``."""
    size = abs(value)
    if not math.isfinite(value):
        return str(float(value))
    if value == 0:
        return "0"
    if size < 1e-4 or size >= 1e7:
        return f"{value:.1e}".replace(".0e", "e")
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def decimal(value: float) -> str:
    """Three decimals, which keep columns of rewards aligned: ``0.700``."""
    return f"{value:.3f}" if math.isfinite(value) and abs(value) < 1000 else number(value)


def compact(value: float) -> str:
    """A count: ``950``, ``12,345``, ``1.23M``, ``4.56B``."""
    if not math.isfinite(value):
        return number(value)
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= limit:
            scaled = value / limit
            return f"{scaled:.3g}{suffix}" if abs(scaled) < 1000 else f"{value:.1e}"
    return f"{value:,.0f}"


def percent(share: float) -> str:
    """A share between 0 and 1: ``12%``, ``0.4%``."""
    if not math.isfinite(share) or abs(share) >= 100:
        return number(share * 100) + "%"
    return f"{share:.1%}" if 0 < abs(share) < 0.01 else f"{share:.0%}"


def duration(seconds: float) -> str:
    """``31 ms``, ``4.2 s``, ``12:03``, ``1:02:03``, ``5 d 4 h``; ``?`` for what is no length of time."""
    if not 0 <= seconds < 1e10:
        return "?"
    if seconds < 0.1:
        return f"{seconds * 1e3:.2g} ms" if seconds else "0 s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24:,} d {hours % 24} h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def spelled(seconds: float) -> str:
    """A length of time that stands alone: ``4.2 s``, ``9 min 5 s``, ``2 h 3 min``."""
    if not 60 <= seconds < 1e10:
        return duration(seconds) if not 10 <= seconds < 60 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def mean(values: Iterable[float]) -> float:
    """Mean of the finite values, nan if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    # Divided first: the sum of large values may overflow, their mean cannot.
    return math.fsum(value / len(finite) for value in finite) if finite else math.nan


def trend(values: Sequence[float], window: int = 10) -> float:
    """Mean of the latest ``window`` values less the mean of the ``window`` before; nan if there are under 4."""
    window = min(window, len(values) // 2)
    return mean(values[-window:]) - mean(values[-2 * window : -window]) if window >= 2 else math.nan
