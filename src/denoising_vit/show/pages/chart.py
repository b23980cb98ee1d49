"""Line charts of figures over steps, as the numbers that a page's SVG is drawn from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEFT, RIGHT, TOP, BOTTOM = 52.0, 464.0, 14.0, 184.0
"""The box of the lines, in a picture of 480 x 220."""

MOST = 240
"""Points of a line: of more, the mean of each run of neighbours is drawn."""


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: what it shows.
        points: (x, y) in the picture.
        first: the first value.
        last: the last value.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    first: float
    last: float


@dataclass(frozen=True)
class LineChart:
    """Some lines over the same steps.

    Attributes:
        title: what they show.
        unit: of the steps.
        lines: at most three.
        down: places of labels along the height: y, and what it says.
        across: places of labels along the width: x, and what it says.
    """

    title: str
    unit: str
    lines: tuple[Line, ...]
    down: tuple[tuple[float, str], ...]
    across: tuple[tuple[float, str], ...]


def line_chart(title: str, unit: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> LineChart | None:
    """A chart of lines of (step, value); values that are not finite are left out, and None comes where none are left.

    Args:
        title: what they show.
        unit: of the steps.
        lines: by their names; steps ascend.
    """
    sound = {name: [point for point in points if math.isfinite(point[1])] for name, points in lines.items()}
    sound = {name: _averaged(points) for name, points in sound.items() if points}
    if not sound:
        return None
    steps = [step for points in sound.values() for step, _ in points]
    values = [value for points in sound.values() for _, value in points]
    (least, greatest), (first, last) = _apart(min(values), max(values)), _apart(min(steps), max(steps))
    ticks = _ticks(least, greatest)

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (RIGHT - LEFT) * (step - first) / (last - first)
        return round(x, 1), round(BOTTOM - (BOTTOM - TOP) * (value - least) / (greatest - least), 1)

    return LineChart(
        title,
        unit,
        tuple(
            Line(name, tuple(place(*point) for point in points), points[0][1], points[-1][1])
            for name, points in sound.items()
        ),
        tuple((place(first, value)[1], f"{value:.3g}".replace("-", "−")) for value in ticks),
        tuple((place(step, least)[0], f"{step:g}") for step in _ticks(first, last)),
    )


def _averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most so many points: the means of runs of neighbours."""
    run = math.ceil(len(points) / MOST)
    runs = [points[start : start + run] for start in range(0, len(points), run)]
    return [(sum(step for step, _ in one) / len(one), sum(value for _, value in one) / len(one)) for one in runs]


def _apart(low: float, high: float) -> tuple[float, float]:
    """Two ends with something between them."""
    margin = abs(high) * 0.05 or 0.5
    return (low, high) if high - low > 1e-9 * max(abs(low), abs(high)) else (low - margin, high + margin)


def _ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers from low to high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
