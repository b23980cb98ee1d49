"""The page of a diagnosis: one HTML file with everything in it, for readers who do not know the method.

What it says is in ``page.html``; here are its pictures and numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from denoising_vit.decomposition.calibration.stability import ENOUGH
from denoising_vit.diagnosis import verdict
from denoising_vit.diagnosis.diagnose import Diagnosis
from denoising_vit.diagnosis.evidence import Evidence
from denoising_vit.maps import PCABasis, norm_maps
from denoising_vit.show.pages import Picture, jpeg_uri, png_uri, render
from denoising_vit.show.pages.rendering import basename
from denoising_vit.show.pages.scales import scale_colours


@dataclass(frozen=True)
class _Row:
    """A shown photo: the photo, and a line of PCA maps and one of norms, a picture for each source."""

    photo: Picture
    colours: list[Picture]
    norms: list[Picture]


@dataclass(frozen=True)
class _Chart:
    """A line in a box of 480 x 220: points (x, y, photos, correlation, labelled or not), ticks (y, correlation)."""

    points: list[tuple[float, float, int, float, bool]]
    ticks: list[tuple[float, float]]


def render_page(diagnosis: Diagnosis, command: str | None = None) -> str:
    """The page of a diagnosis as HTML: self-contained, without scripts, for screens and paper.

    Args:
        diagnosis: what it tells of.
        command: that does it again, where it came from one.
    """
    evidence = diagnosis.evidence
    calibration = evidence.calibration
    info: dict[str, Any] = dict(diagnosis.info)
    rows, scale = _rows(evidence)
    g, g_scale = _artifact(evidence)
    return render(
        "page.html",
        "denoising_vit.diagnosis",
        diagnosis=diagnosis,
        backbone=info.get("backbone") or calibration.artifact.backbone,
        info=info,
        severity=_severity(diagnosis),
        calibration=calibration,
        artifact_pictures=g,
        artifact_scale=g_scale,
        rows=rows,
        scale=scale,
        bar=scale_colours(),
        chart=_chart(calibration.split_half),
        enough=ENOUGH,
        thresholds=_thresholds(),
        command=command,
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


def _artifact(evidence: Evidence) -> tuple[list[Picture], tuple[float, float]]:
    """G in colours of its own, because it is small beside the features, and its norm with the ends of the scale."""
    artifact = evidence.calibration.artifact
    ratio = artifact.size[1] / artifact.size[0]
    (norm,), scale = norm_maps(artifact.values)
    colours = PCABasis.fit(artifact.values).colours(artifact.values)
    return [
        Picture(png_uri(colours), ratio, "G, as colours", "the artifact G, its three principal components as colours"),
        Picture(png_uri(norm), ratio, "G, size", "the size of the artifact G at each patch"),
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
        name = basename(shown.name)
        photo = Picture(jpeg_uri(shown.pixels), ratio, "photo", f"the photo {name}")
        colours = [
            Picture(png_uri(basis.colours(features)), ratio, source, f"{source} features of {name} as colours")
            for source, features in shown.maps.items()
        ]
        sizes = [
            Picture(png_uri(next(pictures)), ratio, f"{source}, length", f"length of {source} features of {name}")
            for source in shown.maps
        ]
        rows.append(_Row(photo, colours, sizes))
    return rows, scale


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
