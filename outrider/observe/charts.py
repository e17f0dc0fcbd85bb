"""Curves as SVG, for a page without scripts: hover tells values through ``<title>``."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from itertools import pairwise
from typing import TypeAlias

from outrider.observe.figures import mean, number

Format: TypeAlias = Callable[[float], str]

_WIDTH, _HEIGHT = 380, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 26
_BUCKETS = 90  # more points than this are drawn as means, with a band from the lowest to the highest
_DOTS = 30  # up to this many points each gets a dot
_COLOURS = 6
_LARGEST = 1e100  # what is beyond is left out like nan: its square still has to be a float


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over one x axis.

    x: ascending. series: by name, values at x; what is not finite is a gap. lines: values to mark on the y axis,
    by name. floor and ceiling: the y axis reaches at least so far. log: a logarithmic y axis, on which values
    ≤ 0 are gaps. stacked: the series are parts of a whole, drawn one on top of the other.
    """

    title: str
    x: Sequence[float]
    series: Mapping[str, Sequence[float]]
    unit: str = ""
    x_name: str = "step"
    lines: dict[str, float] = field(default_factory=dict)
    floor: float | None = None
    ceiling: float | None = None
    log: bool = False
    stacked: bool = False
    format: Format = number
    x_format: Format = number


@dataclass(frozen=True)
class Bucket:
    """Neighbouring points drawn as one: x from ``first`` to ``last``, for each series (mean, lowest, highest)."""

    first: float
    last: float
    values: list[tuple[float, float, float]]

    @property
    def x(self) -> float:
        """The middle."""
        return self.first / 2 + self.last / 2


@dataclass(frozen=True)
class Axis:
    """Maps ``low`` to the pixel ``start`` and ``high`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of a value inside the range."""
        low, high, at = map(math.log10, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def render_chart(chart: Chart) -> str:
    """``<figure>`` with a caption, a legend and the drawing. Colours are the classes ``c0`` to ``c5`` of the page."""
    chart = _placed(chart)
    unit = f' <span class="unit">{escape(chart.unit)}</span>' if chart.unit else ""
    caption = f"<figcaption>{escape(chart.title)}{unit}</figcaption>"
    buckets = list(_buckets(chart))
    values = [value for bucket in buckets for triple in bucket.values for value in triple if math.isfinite(value)]
    if not values:
        return f'<figure>{caption}<p class="empty">no data</p></figure>'
    return f"<figure>{caption}{_legend(chart)}{_drawing(chart, buckets, values)}</figure>"


def _placed(chart: Chart) -> Chart:
    """Without the points that have no place on the x axis."""
    kept = [place for place, at in enumerate(chart.x) if _drawable(at, log=False)]
    series = {name: [values[place] for place in kept] for name, values in chart.series.items()}
    return replace(chart, x=[chart.x[place] for place in kept], series=series)


def _drawing(chart: Chart, buckets: list[Bucket], values: list[float]) -> str:
    marks = [value for value in chart.lines.values() if _drawable(value, chart.log)]
    bounds = [bound for bound in (chart.floor, chart.ceiling) if bound is not None]
    y_ticks = _log_ticks([*values, *marks]) if chart.log else _ticks([*values, *marks, *bounds], 4, outside=True)
    y = Axis(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP, chart.log)
    low, high = min(chart.x), max(chart.x)
    # A single point has no extent: put it in the middle of one step.
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    x = Axis(low, high, _LEFT, _WIDTH - _RIGHT)
    shapes = [*_grid(chart, x, y, y_ticks)]
    series = range(len(chart.series))
    shapes += _stack(buckets, series, x, y) if chart.stacked else _curves(chart, buckets, series, x, y)
    for value in marks:
        at = y(value)
        shapes.append(f'<line class="mark" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
    shapes += _tooltips(chart, buckets, x)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(chart.title)}">{"".join(shapes)}</svg>'
    )


def _buckets(chart: Chart) -> Iterator[Bucket]:
    count = min(len(chart.x), _BUCKETS)
    columns = list(chart.series.values())
    for bucket in range(count):
        start, end = bucket * len(chart.x) // count, (bucket + 1) * len(chart.x) // count
        values = [_spread(column[start:end], chart.log) for column in columns]
        if chart.stacked:
            values = list(_accumulated(values))
        yield Bucket(chart.x[start], chart.x[end - 1], values)


def _spread(values: Iterable[float], log: bool) -> tuple[float, float, float]:
    kept = [value for value in values if _drawable(value, log)]
    return (mean(kept), min(kept), max(kept)) if kept else (math.nan, math.nan, math.nan)


def _accumulated(values: Iterable[tuple[float, float, float]]) -> Iterator[tuple[float, float, float]]:
    """Each part as (its top, its bottom, its top) on top of the parts before."""
    total = 0.0
    for part, _, _ in values:
        bottom, total = total, total + (part if math.isfinite(part) else 0.0)
        yield total, bottom, total


def _drawable(value: float, log: bool) -> bool:
    return abs(value) < _LARGEST and (value > 1e-30 or not log)  # comparisons with nan are false


def _curves(chart: Chart, buckets: list[Bucket], series: Iterable[int], x: Axis, y: Axis) -> Iterator[str]:
    grouped = len(chart.x) > len(buckets)
    for index in series:
        runs = list(_runs(buckets, index))
        for run in runs if grouped else ():
            upper = [f"{x(bucket.x):.1f},{y(bucket.values[index][2]):.1f}" for bucket in run]
            lower = [f"{x(bucket.x):.1f},{y(bucket.values[index][1]):.1f}" for bucket in reversed(run)]
            yield f'<polygon class="band c{index % _COLOURS}" points="{" ".join(upper + lower)}"/>'
        for run in runs:
            points = [(x(bucket.x), y(bucket.values[index][0])) for bucket in run]
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            yield f'<polyline class="curve c{index % _COLOURS}" points="{path}"/>'
            for a, b in points if len(buckets) <= _DOTS or len(run) == 1 else ():
                yield f'<circle class="dot c{index % _COLOURS}" cx="{a:.1f}" cy="{b:.1f}" r="2.2"/>'


def _runs(buckets: list[Bucket], index: int) -> Iterator[list[Bucket]]:
    """Stretches of buckets in which the series has values."""
    run: list[Bucket] = []
    for bucket in buckets:
        if math.isfinite(bucket.values[index][0]):
            run.append(bucket)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _stack(buckets: list[Bucket], series: Iterable[int], x: Axis, y: Axis) -> Iterator[str]:
    # Every bucket is as wide as what it stands for, so that single slow steps keep their place.
    width = (x.end - x.start) / len(buckets)
    for index in series:
        for place, bucket in enumerate(buckets):
            top, bottom, _ = bucket.values[index]
            if top > bottom:
                yield (
                    f'<rect class="part c{index % _COLOURS}" x="{x.start + place * width:.1f}" y="{y(top):.1f}" '
                    f'width="{width * 0.92:.1f}" height="{y(bottom) - y(top):.1f}"/>'
                )


def _grid(chart: Chart, x: Axis, y: Axis, y_ticks: list[float]) -> Iterator[str]:
    for tick in y_ticks:
        at = y(tick)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text x="{_LEFT - 5}" y="{at + 3:.1f}" text-anchor="end">{escape(chart.format(tick))}</text>'
    points = min(chart.x), max(chart.x)
    for tick in _ticks(points, 5) if points[0] < points[1] else points[:1]:
        yield f'<text x="{x(tick):.1f}" y="{_HEIGHT - 13}" text-anchor="middle">{escape(chart.x_format(tick))}</text>'
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    yield f'<text class="axis" x="{middle}" y="{_HEIGHT - 1}" text-anchor="middle">{escape(chart.x_name)}</text>'


def _tooltips(chart: Chart, buckets: list[Bucket], x: Axis) -> Iterator[str]:
    """An invisible strip for each bucket, as wide as reaches halfway to its neighbours."""
    if chart.stacked:
        edges = [x.start + place * (x.end - x.start) / len(buckets) for place in range(len(buckets) + 1)]
    else:
        middles = [x(bucket.x) for bucket in buckets]
        edges = [x.start, *((a + b) / 2 for a, b in pairwise(middles)), x.end]
    for place, bucket in enumerate(buckets):
        until = f"–{chart.x_format(bucket.last)}" if bucket.last > bucket.first else ""
        told = [f"{chart.x_name} {chart.x_format(bucket.first)}{until}"]
        for name, (middle, low, high) in zip(chart.series, bucket.values, strict=True):
            if chart.stacked:
                told.append(f"{name}: {chart.format(middle - low)}")
            else:
                spread = f" ({chart.format(low)} to {chart.format(high)})" if high > low else ""
                told.append(f"{name}: {chart.format(middle)}{spread}")
        width = max(edges[place + 1] - edges[place], 0.0)
        yield (
            f'<rect class="hover" x="{edges[place]:.1f}" y="{_TOP}" width="{width:.1f}" '
            f'height="{_HEIGHT - _BOTTOM - _TOP}"><title>{escape(chr(10).join(told))}</title></rect>'
        )


def _legend(chart: Chart) -> str:
    entries = [
        f'<span><i class="c{index % _COLOURS}"></i>{escape(name)}</span>' for index, name in enumerate(chart.series)
    ]
    entries += [
        f'<span><i class="dashed"></i>{escape(name)} {escape(chart.format(value))}</span>'
        for name, value in chart.lines.items()
    ]
    return f'<div class="legend">{"".join(entries)}</div>' if len(entries) > 1 else '<div class="legend"></div>'


def _ticks(values: Sequence[float], count: int, outside: bool = False) -> list[float]:
    """Round numbers over the range of ``values``, about ``count``; outside: the first and last enclose it."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if size < 1 / _LARGEST:
        low, high = 0.0, 1.0
    elif high - low < size * 1e-9:
        # Constant: a range around it, so that the line runs through the middle.
        low, high = low - size * 0.1, high + size * 0.1
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    if outside:
        return [place * step for place in range(math.floor(low / step), math.ceil(high / step) + 1)]
    return [place * step for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(values: Sequence[float]) -> list[float]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    stride = -(-(high - low) // 5)
    return [10.0**power for power in range(low, high + stride, stride)]
