"""The page of a diagnosis: one HTML file with everything in it, for readers who do not know the method.

What it says is in ``page.html``; here are its pictures and numbers.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from denoising_vit.calibration.stability import ENOUGH
from denoising_vit.diagnosis import verdict
from denoising_vit.diagnosis.diagnose import Diagnosis
from denoising_vit.diagnosis.evidence import Evidence
from denoising_vit.files import atomic_path
from denoising_vit.visualize import PCABasis, norm_maps


@dataclass(frozen=True)
class _Picture:
    """An image for the page: its data URI, its ratio of width to height as drawn, its heading and description."""

    uri: str
    ratio: float
    heading: str
    alt: str


@dataclass(frozen=True)
class _Row:
    """A shown photo: the photo, and a line of PCA maps and one of norms, a picture for each source."""

    photo: _Picture
    colours: list[_Picture]
    norms: list[_Picture]


@dataclass(frozen=True)
class _Chart:
    """A line in a box of 480 x 220: points (x, y, photos, correlation, labelled or not), ticks (y, correlation)."""

    points: list[tuple[float, float, int, float, bool]]
    ticks: list[tuple[float, float]]


def write_page(diagnosis: Diagnosis, path: Path) -> None:
    """Writes the page of a diagnosis; there is either all of it or what was there before.

    Raises:
        OSError: if the file cannot be written.
    """
    # Names of files need not be valid text; what is not is shown escaped.
    page = render_page(diagnosis).encode("utf-8", "backslashreplace")
    with atomic_path(Path(path)) as temporary:
        temporary.write_bytes(page)


def render_page(diagnosis: Diagnosis) -> str:
    """The page of a diagnosis as HTML: self-contained, without scripts, for screens and paper."""
    environment = Environment(
        loader=PackageLoader("denoising_vit.diagnosis", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": _figure, "percent": _percent, "basename": _basename}
    evidence = diagnosis.evidence
    calibration = evidence.calibration
    info: dict[str, Any] = dict(diagnosis.info)
    rows, scale = _rows(evidence)
    g, g_scale = _artifact(evidence)
    return environment.get_template("page.html").render(
        diagnosis=diagnosis,
        backbone=info.get("backbone") or calibration.artifact.backbone,
        info=info,
        severity=_severity(diagnosis),
        calibration=calibration,
        artifact_pictures=g,
        artifact_scale=g_scale,
        rows=rows,
        scale=scale,
        bar=_bar(),
        chart=_chart(calibration.split_half),
        enough=ENOUGH,
        thresholds=_thresholds(),
        version=importlib.metadata.version("denoising-vit"),
    )


def _severity(diagnosis: Diagnosis) -> Literal["good", "weak", "bad"]:
    """The colour of the verdict: how strong the artifacts are, whether or not something can be done about them."""
    if not diagnosis.findings:
        return "good"
    return "weak" if all(finding.strength == "weak" for finding in diagnosis.findings) else "bad"


def _thresholds() -> dict[str, tuple[float, ...]]:
    """All that the verdict draws a line at, by name; read from there, so that the page never lags behind."""
    named = {name: value for name, value in vars(verdict).items() if name.isupper() and not name.startswith("_")}
    return {name: value if isinstance(value, tuple) else (value,) for name, value in named.items()}


def _artifact(evidence: Evidence) -> tuple[list[_Picture], tuple[float, float]]:
    """G in colours of its own, because it is small beside the features, and its norm with the ends of the scale."""
    artifact = evidence.calibration.artifact
    ratio = artifact.size[1] / artifact.size[0]
    (norm,), scale = norm_maps(artifact.values)
    colours = PCABasis.fit(artifact.values).colours(artifact.values)
    return [
        _Picture(_png(colours), ratio, "G, as colours", "the artifact G, its three principal components as colours"),
        _Picture(_png(norm), ratio, "G, size", "the size of the artifact G at each patch"),
    ], scale


def _rows(evidence: Evidence) -> tuple[list[_Row], tuple[float, float]]:
    """The shown photos, everything in the same colours and norms on one scale, with the ends of that scale."""
    if not evidence.shown:
        return [], (0.0, 0.0)
    every = [features for shown in evidence.shown for features in shown.maps.values()]
    basis = PCABasis.fit(*every)
    norms, scale = norm_maps(*every)
    pictures = iter(norms)
    rows = []
    for shown in evidence.shown:
        ratio = shown.pixels.shape[1] / shown.pixels.shape[0]
        name = _basename(shown.name)
        photo = _Picture(_jpeg(shown.pixels), ratio, "photo", f"the photo {name}")
        colours = [
            _Picture(_png(basis.colours(features)), ratio, source, f"{source} features of {name} as colours")
            for source, features in shown.maps.items()
        ]
        sizes = [
            _Picture(_png(next(pictures)), ratio, f"{source}, length", f"length of {source} features of {name}")
            for source in shown.maps
        ]
        rows.append(_Row(photo, colours, sizes))
    return rows, scale


def _bar() -> str:
    """The colours of norms from the least to the greatest."""
    (picture,), _ = norm_maps(np.linspace(0, 1, 128, dtype=np.float32)[None, :, None])
    return _png(picture)


def _chart(correlations: Mapping[int, float]) -> _Chart | None:
    """The line of correlation by number of photos, which doubles from point to point."""
    if not correlations:
        return None
    left, right, top, bottom = 44.0, 456.0, 14.0, 184.0
    least = min(0.0, math.floor(min(correlations.values()) * 4) / 4)
    counts = sorted(correlations)
    span = math.log(counts[-1] / counts[0]) or 1.0
    across = [left + 16 + (right - left - 32) * math.log(count / counts[0]) / span for count in counts]

    def down(value: float) -> float:
        return round(bottom - (bottom - top) * (value - least) / (1 - least), 1)

    points = []
    for place, count, following in zip(across, counts, [*across[1:], math.inf], strict=True):
        fits = following - place > 26  # the last of 64 and 70 photos is the one to be read
        points.append((round(place, 1), down(correlations[count]), count, correlations[count], fits))
    return _Chart(points, [(down(value), float(value)) for value in np.arange(least, 1.01, 0.25)])


def _png(picture: np.ndarray) -> str:
    """One pixel for each patch: the page enlarges it without smoothing, which would hide artifacts."""
    return _uri(picture, "png", optimize=True)


def _jpeg(photo: np.ndarray) -> str:
    return _uri(photo, "jpeg", quality=85)


def _uri(pixels: np.ndarray, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _figure(value: float | None) -> str:
    """Three significant digits; a dash for what was not measured."""
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 999.5:
        return f"{value:.0f}".replace("-", "−")
    return f"{value:#.3g}".rstrip(".").replace("-", "−")


def _percent(share: float) -> str:
    return f"{share:.1%}"  # as the words of findings have it


def _basename(name: str) -> str:
    """The last part of a path or address."""
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1]
