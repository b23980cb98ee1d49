"""Render templates, pictures, metrics and line charts to one HTML file without scripts or network access."""

from __future__ import annotations

import base64
import functools
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from PIL import Image

from denoising_vit.environment import package_version
from denoising_vit.files import Mark, atomic_path, owned_path
from denoising_vit.maps.colours import NORM_COLOURS
from denoising_vit.maps.features import lookup


@dataclass(frozen=True)
class Picture:
    """An image on a page: data URI, aspect ratio (width / height), heading, text for screen readers."""

    uri: str
    ratio: float
    heading: str
    alt: str


def render(template: str, package: str = "denoising_vit.show.pages", **values: Any) -> str:
    """Render a page from a template of a package; text in values is escaped. ``base.html`` is always from here."""
    packages = dict.fromkeys((package, "denoising_vit.show.pages"))
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name, ".") for name in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "percent": "{:.1%}".format, "basename": basename}
    return environment.get_template(template).render(version=package_version(), **values)


def write_page(page: str, path: Path, mark: Mark | None = None) -> None:
    """Write a page atomically; with a mark, OutputError if a file with another mark or without a mark exists."""
    # File names need not be valid text; invalid characters are escaped.
    with atomic_path(path) if mark is None else owned_path(path, mark) as temporary:
        temporary.write_bytes(page.encode("utf-8", "backslashreplace"))


def png_uri(picture: np.ndarray) -> str:
    """A map (h, w, 3) uint8 as a data URI, one pixel per patch; the page enlarges it without smoothing."""
    return _uri(Image.fromarray(np.ascontiguousarray(picture)), "png", optimize=True)


def jpeg_uri(photo: np.ndarray, longest: int = 640) -> str:
    """A photo (H, W, 3) uint8 as a data URI, shrunk to ``longest`` pixels on its longer side."""
    step = max(1, max(photo.shape[:2]) // (4 * longest))
    image = Image.fromarray(np.ascontiguousarray(photo[::step, ::step]))
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return _uri(image, "jpeg", quality=85)


@functools.cache
def scale_colours(name: str = NORM_COLOURS) -> str:
    """A colour bar one pixel high as a data URI."""
    return png_uri(lookup(np.linspace(0, 1, 128)[None], name))


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return data_uri(buffer.getvalue(), f"image/{kind}")


def data_uri(content: bytes, kind: str) -> str:
    """Content of a media type as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def figure(value: float | None) -> str:
    """Format with three significant digits; a dash for None."""
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 999.5:
        return f"{value:.0f}".replace("-", "−")
    return f"{value:#.3g}".rstrip(".").replace("-", "−")


def basename(name: str) -> str:
    """The last part of a path or URL."""
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1]


LEFT, RIGHT, TOP, BOTTOM = 52.0, 464.0, 14.0, 184.0
"""Plot area of a chart, in an SVG of 480 x 220."""

MOST = 240
"""Maximum number of points of a line; longer lines are averaged over neighbours."""

_APART = 26.0
"""Minimum distance in pixels between labels of a logarithmic axis."""


@dataclass(frozen=True)
class Line:
    """A line of a chart, with its first and last value."""

    name: str
    points: tuple[tuple[float, float], ...]  # (x, y) in the picture
    first: float
    last: float


@dataclass(frozen=True)
class LineChart:
    """Lines over the same steps."""

    title: str
    unit: str  # of the steps
    lines: tuple[Line, ...]  # at most three
    down: tuple[tuple[float, str], ...]  # y and text of the labels of the vertical axis
    across: tuple[tuple[float, str], ...]  # x and text of the labels of the horizontal axis
    marks: tuple[tuple[float, float, float, float], ...] = ()  # x, y, step and value of marked points


def line_chart(
    title: str,
    unit: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    doubling: bool = False,
    span: tuple[float, float] | None = None,
) -> LineChart | None:
    """A chart of lines of (step, value); None without finite values. Values that are not finite are skipped.

    Args:
        title: title of the chart.
        unit: unit of the steps.
        lines: points by name, with ascending steps.
        doubling: use logarithmic steps, with a mark and a label at each.
        span: minimum and maximum of the vertical axis; defaults to those of the lines.
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
        if not (doubling and across and across[-1][0] - x < _APART):  # of 64 and 70, only 70 is labelled
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
    """The ends of an axis, moved apart if they are equal."""
    margin = abs(high) * 0.05 or 0.5
    return (low, high) if high - low > 1e-9 * max(abs(low), abs(high)) else (low - margin, high + margin)


def _ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers from low to high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
