"""Line charts as the coordinates of an SVG of 480 x 220."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEFT, RIGHT, TOP, BOTTOM = 52.0, 464.0, 14.0, 184.0
"""The box of the lines."""

MOST = 240
"""Points of a line; of more, means of neighbours are drawn."""

_APART = 26.0
"""Pixels between labels of a doubling axis."""


@dataclass(frozen=True)
class Line:
    """A line of a chart, with its first and last value."""

    name: str
    points: tuple[tuple[float, float], ...]  # (x, y) in the picture
    first: float
    last: float


@dataclass(frozen=True)
class LineChart:
    """Lines over the same steps.

    Attributes:
        title: title of the chart.
        unit: unit of the steps.
        lines: at most three.
        down: y and text of the labels of the vertical axis.
        across: x and text of the labels of the horizontal axis.
        marks: x, y, step and value of marked points.
    """

    title: str
    unit: str
    lines: tuple[Line, ...]
    down: tuple[tuple[float, str], ...]
    across: tuple[tuple[float, str], ...]
    marks: tuple[tuple[float, float, float, float], ...] = ()


def line_chart(
    title: str,
    unit: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    doubling: bool = False,
    span: tuple[float, float] | None = None,
) -> LineChart | None:
    """A chart of lines of (step, value); None without finite values, others are left out.

    Args:
        title: title of the chart.
        unit: unit of the steps.
        lines: points by name; steps ascend.
        doubling: logarithmic steps, with a mark and a label at each.
        span: least and greatest value of the vertical axis; those of the lines by default.
    """
    finite = {name: [point for point in points if math.isfinite(point[1])] for name, points in lines.items()}
    finite = {name: _averaged(points) for name, points in finite.items() if points}
    if not finite:
        return None
    points = [point for line in finite.values() for point in line]
    steps, values = zip(*points, strict=True)
    least, greatest = span or _apart(min(values), max(values))
    first, last = _apart(*((math.log2(step) if doubling else step) for step in (min(steps), max(steps))))

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (RIGHT - LEFT) * ((math.log2(step) if doubling else step) - first) / (last - first)
        return round(x, 1), round(BOTTOM - (BOTTOM - TOP) * (value - least) / (greatest - least), 1)

    across: list[tuple[float, str]] = []
    for step in sorted(set(steps), reverse=True) if doubling else _ticks(first, last):
        x = place(step, least)[0]
        if not (doubling and across and across[-1][0] - x < _APART):  # 64 and 70: only the last is labelled
            across.append((x, f"{step:g}"))
    return LineChart(
        title,
        unit,
        tuple(
            Line(name, tuple(place(*point) for point in line), line[0][1], line[-1][1]) for name, line in finite.items()
        ),
        tuple((place(steps[0], value)[1], f"{value:.3g}".replace("-", "−")) for value in _ticks(least, greatest)),
        tuple(across),
        tuple((*place(*point), *point) for point in points) if doubling else (),
    )


def _averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most :data:`MOST` points: means of runs of neighbours."""
    run = math.ceil(len(points) / MOST)
    runs = [points[start : start + run] for start in range(0, len(points), run)]
    return [(sum(step for step, _ in one) / len(one), sum(value for _, value in one) / len(one)) for one in runs]


def _apart(low: float, high: float) -> tuple[float, float]:
    """The two ends, widened where they are equal."""
    margin = abs(high) * 0.05 or 0.5
    return (low, high) if high - low > 1e-9 * max(abs(low), abs(high)) else (low - margin, high + margin)


def _ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers from low to high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
