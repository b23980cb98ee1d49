"""The page of a diagnosis: complete, self-contained, and safe for any file name."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from denoising_vit.artifact import Artifact
from denoising_vit.data import Skipped
from denoising_vit.decomposition.calibration import Calibration, Stability
from denoising_vit.diagnosis import verdict
from denoising_vit.diagnosis.diagnose import Diagnosis
from denoising_vit.diagnosis.evidence import Evidence, Shown
from denoising_vit.diagnosis.page import render_page
from denoising_vit.diagnosis.verdict import Finding, Judgement, Verdict
from denoising_vit.metrics.artifacts import ArtifactMetrics
from denoising_vit.show.pages.rendering import write_page
from html_page import Page

GRID, CHANNELS = (3, 5), 7
SOURCES: list[str] = ["raw", "subtract", "other & <b>"]
NASTY = "photos/<script>alert(1)<.&.jpg"


def metrics(start: float, **changes: Any) -> ArtifactMetrics:
    """Metrics that all differ: 0.101 + start, 0.102 + start, ..."""
    fields = dataclasses.fields(ArtifactMetrics)
    values = {field.name: start + 0.101 + 0.001 * number for number, field in enumerate(fields)}
    return ArtifactMetrics(**{**values, **changes})


def features(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, *GRID, CHANNELS, generator=torch.Generator().manual_seed(seed))


def made(shown: int = 1, **changes: Any) -> Diagnosis:
    """A diagnosis with two sources besides raw; the maps of the second one equal those of raw."""
    stability = Stability(8, 2.0, 3.0, 0.625)
    about = {"name": "vit <tiny> & co", "weights": "a file"}
    artifact = Artifact(features(1), (42, 70), about, {})
    calibration = Calibration(artifact, stability, {4: -0.1, 8: 0.625}, (Skipped("<i>.png", "cut & <broken>"),))
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)
    maps = dict(zip(SOURCES, (features(2), features(3), features(2)), strict=True))
    photos = tuple(Shown(NASTY, pixels, maps) for _ in range(shown))
    evidence = Evidence({name: features(4, 8) for name in SOURCES}, {}, calibration, features(5, 2), photos)
    figures = {name: metrics(number) for number, name in enumerate(SOURCES)}
    judgements = {
        "subtract": Judgement("denoised", "positional gone"),
        SOURCES[2]: Judgement("blurred", "detail is <0.5"),
    }
    found = (Finding("positional", "strong", 0.25, "25.0% of the variance"),)
    info = {"backbone": about, "views": 13, "seed": 17, "photos": [NASTY, "b.jpg"], "seconds": 12.5, "size": None}
    diagnosis = Diagnosis(
        Verdict(True, "subtract", "Clean & be <quick>."), found, judgements, figures, 0.25, evidence, info
    )
    return replace(diagnosis, **changes)


def decoded(image: dict[str, str]) -> Image.Image:
    head, data = image["src"].split(",", 1)
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB")


def ratio(image: dict[str, str]) -> float:
    (found,) = re.findall(r"--ratio: ([\d.]+)", image["style"])
    return float(found)


def test_names_and_words_are_escaped():
    page = render_page(made())
    assert "<script" not in page
    assert "<b>" not in page and "<i>" not in page and "<tiny>" not in page
    text = Page(page).words
    for part in (NASTY, "<i>.png: cut & <broken>", "vit <tiny> & co", "Clean & be <quick>.", SOURCES[2], "is <0.5"):
        assert part in text


def test_nothing_is_loaded_from_elsewhere():
    elements = Page(render_page(made())).elements
    assert not {"script", "link", "iframe"} & {tag for tag, _ in elements}
    for _, about in elements:
        for key in ("src", "href"):
            assert about.get(key, "#").startswith(("data:", "#"))
    page = render_page(made())
    assert "http:" not in page and "https:" not in page and "@import" not in page and "url(" not in page


def test_page_shows_all_metrics_and_judgements():
    diagnosis = made()
    words = Page(render_page(diagnosis)).words
    for figures in diagnosis.metrics.values():
        for value in dataclasses.astuple(figures):
            shown = f"{value:.3f}" if value < 1 else f"{value:.2f}"
            assert shown in words
    for judgement in diagnosis.judgements.values():
        assert judgement.outcome in words and judgement.words in words


def test_metrics_have_three_digits_and_a_dash_if_missing():
    values = {"effective_rank": 101.98, "leakage": 0.059532, "linear_position": -2.378, "mic": 0.5, "detail": 1234.56}
    page = render_page(made(metrics={"raw": metrics(0, **values, outliers_low=0.0, consistency=None)}, judgements={}))
    assert "None" not in page
    cells = dict(re.findall(r'<th scope="row">([^<]*)</th>\s*<td class="number">([^<]*)</td>', page))
    shown = {"effective rank": "102", "black-image leakage": "0.0595", "position, linear probe (R²)": "−2.38"}
    shown |= {"position, best channel (MIC)": "0.500", "detail": "1235", "outliers, short": "0"}
    assert {name: cells[name] for name in shown} == shown
    assert cells["agreement of views (R²)"] == cells["judgement"] == "-"


@pytest.mark.parametrize(
    ("strengths", "severity"), [((), "good"), (("weak",), "weak"), (("weak", "moderate"), "bad"), (("strong",), "bad")]
)
def test_the_verdict_has_the_colour_of_the_strongest_finding(strengths, severity):
    found = tuple(Finding("positional", strength, 0.0125, "words") for strength in strengths)
    page = Page(render_page(made(findings=found)))
    assert ("div", {"class": f"verdict {severity}"}) in page.elements
    for strength in strengths:
        assert f"{strength}: positional, 1.2%" in page.words


def test_maps_have_one_pixel_per_patch_and_the_aspect_of_their_photo():
    page = Page(render_page(made()))
    maps = [about for about in page.images() if about.get("class") == "patches"]
    assert len(maps) == 2 + 2 * len(SOURCES)
    for image in maps:
        assert decoded(image).size == GRID[::-1]
    assert [ratio(image) for image in maps] == pytest.approx([70 / 42] * 2 + [1.5] * 6, abs=1e-4)
    (photo,) = page.images("the photo")
    assert decoded(photo).size == (60, 40)
    assert ratio(photo) == 1.5
    assert all(about["alt"] for about in page.images())


def test_maps_of_the_same_features_are_identical():
    page = Page(render_page(made()))
    raw, other = page.images("raw features"), page.images(f"{SOURCES[2]} features")
    cleaned = page.images("subtract features")
    assert len(raw) == 1 and raw[0]["src"] == other[0]["src"] != cleaned[0]["src"]
    lengths = [page.images(f"length of {name}")[0]["src"] for name in SOURCES]
    assert lengths[0] == lengths[2] != lengths[1]


def test_all_photos_share_one_basis():
    diagnosis = made(shown=2)
    first, second = diagnosis.evidence.shown
    far = replace(second, maps={name: 5 + 3 * maps for name, maps in second.maps.items()})
    alone = Page(render_page(diagnosis)).images("raw features")[0]["src"]
    evidence = replace(diagnosis.evidence, shown=(first, far))
    together = Page(render_page(replace(diagnosis, evidence=evidence))).images("raw features")
    assert len(together) == 2
    assert together[0]["src"] != alone


def test_page_without_photos_shows_the_rest():
    page = Page(render_page(made(shown=0)))
    assert "No photos were kept to be shown" in page.words
    assert len(page.images("the artifact G")) == 1


def test_stability_is_plotted_and_described():
    page = Page(render_page(made()))
    assert len([tag for tag, _ in page.elements if tag == "circle"]) == 2
    assert "4 photos: −0.100" in page.words and "8 photos: 0.625" in page.words
    assert "reliability 0.842" in page.words  # 2 / (2 + 3 / 8)
    assert "about 29 for a reliability of 0.95" in page.words  # 19 x 3 / 2
    heights = [float(about["cy"]) for tag, about in page.elements if tag == "circle"]
    assert 184 > heights[0] > heights[1] > 14


def test_photos_with_nothing_in_common_have_no_stability_plot():
    diagnosis = made()
    stability = Stability(8, -0.1, 3.0, 0.0)
    calibration = replace(diagnosis.evidence.calibration, stability=stability, split_half={})
    evidence = replace(diagnosis.evidence, calibration=calibration)
    page = Page(render_page(replace(diagnosis, evidence=evidence, shared=0.0)))
    assert "the photos have nothing in common" in page.words
    assert "No part of the energy" in page.words
    assert "svg" not in {tag for tag, _ in page.elements}


def test_page_shows_the_settings():
    words = Page(render_page(made())).words
    for part in ("70 × 42 pixels, 5 × 3 patches", "views of a photo 13", "seed 17", "seconds 12.5", "weights a file"):
        assert part in words
    assert "b.jpg" in words
    assert "vit <tiny> & co" in Page(render_page(made(info={}))).words  # without these settings


def test_page_describes_every_threshold():
    page = render_page(made())
    words = Page(page).words
    thresholds = {name: value for name, value in vars(verdict).items() if re.fullmatch(r"[A-Z][A-Z_]+", name)}
    assert len(thresholds) >= 8
    for name, value in thresholds.items():
        values = value if isinstance(value, tuple) else (value,)
        assert f"{name} {' / '.join(map(str, values))}" in words
        assert re.search(rf'>{name}</th><td class="number">[^<]*</td><td class="text">[^<]', page), f"{name}: say what"


def test_page_with_six_photos_is_smaller_than_3_mb():
    diagnosis = made(shown=6)
    pixels = np.random.default_rng(1).integers(0, 255, (480, 480, 3)).astype(np.uint8)  # noise: the worst case for JPEG
    shown = tuple(replace(photo, pixels=pixels) for photo in diagnosis.evidence.shown)
    page = render_page(replace(diagnosis, evidence=replace(diagnosis.evidence, shown=shown)))
    assert len(page.encode()) < 3e6


def test_page_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "page.html"
    write_page(render_page(made()), path)
    assert path.read_text("utf-8") == render_page(made())
    before = path.read_bytes()

    def full(*_: Any) -> int:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        write_page(render_page(made(shown=0)), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_undecodable_file_names_are_escaped(tmp_path: Path):
    info = {**made().info, "photos": ["caf\udce9.jpg", "äö.jpg"]}
    write_page(render_page(made(info=info)), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "caf\\udce9.jpg" in page and "äö.jpg" in page
