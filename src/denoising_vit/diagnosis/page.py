"""The page of a diagnosis as one self-contained HTML file: pictures and numbers for the text in ``page.html``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from denoising_vit.decomposition.calibration import ENOUGH
from denoising_vit.diagnosis import verdict
from denoising_vit.diagnosis.diagnose import Diagnosis
from denoising_vit.diagnosis.evidence import Evidence
from denoising_vit.diagnosis.options import WRITTEN
from denoising_vit.environment import run_info
from denoising_vit.files import Mark, owned_path
from denoising_vit.maps import Palette
from denoising_vit.show.pages.rendering import (
    Picture,
    basename,
    jpeg_uri,
    line_chart,
    png_uri,
    render,
    scale_colours,
    write_page,
)


def write_diagnosis(diagnosis: Diagnosis, folder: Path, source: str) -> None:
    """Write the metrics and the page into a folder. Only files made from the same ``source`` digest are replaced.

    Raises:
        OutputError: if a file must not be replaced.
        OSError: if a file cannot be written.
    """
    figures, page = (Mark(kind, source) for kind in WRITTEN.values())
    with owned_path(folder / "diagnosis.json", figures) as temporary:
        temporary.write_text(json.dumps({"made": str(figures), **diagnosis.record()}, indent=1) + "\n")
    write_page(render_page(diagnosis, run_info()["command"]), folder / "diagnosis.html", page)


@dataclass(frozen=True)
class _Row:
    """A photo with a row of PCA maps and a row of norms, one picture per source."""

    photo: Picture
    colours: list[Picture]
    norms: list[Picture]


def render_page(diagnosis: Diagnosis, command: str | None = None) -> str:
    """The page as HTML without scripts, for screens and paper; ``command`` is the command line that repeats it."""
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
        chart=line_chart(
            "Correlation between the artifacts of two halves of the photos, by number of photos",
            "photos",
            {"correlation": sorted(calibration.split_half.items())},
            doubling=True,
            span=(min([0.0, *(math.floor(4 * value) / 4 for value in calibration.split_half.values())]), 1.0),
        ),
        enough=ENOUGH,
        thresholds=_thresholds(),
        command=command,
    )


def _severity(diagnosis: Diagnosis) -> Literal["good", "weak", "bad"]:
    """The colour of the verdict: the strength of the artifacts."""
    if not diagnosis.findings:
        return "good"
    return "weak" if all(finding.strength == "weak" for finding in diagnosis.findings) else "bad"


def _thresholds() -> dict[str, tuple[float, ...]]:
    """All thresholds of the verdict, by name."""
    named = {name: value for name, value in vars(verdict).items() if name.isupper() and not name.startswith("_")}
    return {name: value if isinstance(value, tuple) else (value,) for name, value in named.items()}


def _artifact(evidence: Evidence) -> tuple[list[Picture], tuple[float, float]]:
    """G and its norm in their own colours, because G is small relative to the features, and the ends of the scale."""
    artifact = evidence.calibration.artifact
    ratio = artifact.size[1] / artifact.size[0]
    palette = Palette([artifact.values])
    colours, norm = (palette.colours(kind, artifact.values) for kind in ("pca", "norm"))
    return [
        Picture(png_uri(colours), ratio, "G, as colours", "the artifact G, its three principal components as colours"),
        Picture(png_uri(norm), ratio, "G, size", "the size of the artifact G at each patch"),
    ], (palette.norms.low, palette.norms.high)


def _rows(evidence: Evidence) -> tuple[list[_Row], tuple[float, float]]:
    """The photos in shared colours, and the ends of the scale of norms."""
    if not evidence.shown:
        return [], (0.0, 0.0)
    palette = Palette([features for shown in evidence.shown for features in shown.maps.values()])
    rows = []
    for shown in evidence.shown:
        ratio = shown.pixels.shape[1] / shown.pixels.shape[0]
        name = basename(shown.name)
        photo = Picture(jpeg_uri(shown.pixels), ratio, "photo", f"the photo {name}")
        row = _Row(photo, [], [])
        for source, features in shown.maps.items():
            pca, norm = (png_uri(palette.colours(kind, features)) for kind in ("pca", "norm"))
            row.colours.append(Picture(pca, ratio, source, f"{source} features of {name} as colours"))
            row.norms.append(Picture(norm, ratio, f"{source}, length", f"length of {source} features of {name}"))
        rows.append(row)
    return rows, (palette.norms.low, palette.norms.high)
