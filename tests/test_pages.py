"""Pages of runs and of batches of photos: complete, self-contained, and safe for any names of photos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import planted
from command import Dvit, in_process
from denoising_vit import Decomposition
from denoising_vit.denoise import denoise_image
from denoising_vit.errors import EvaluationError
from denoising_vit.show.pages import photos as photos_module
from denoising_vit.show.pages.photos import PhotosPage
from denoising_vit.show.pages.rendering import BOTTOM, LEFT, MOST, RIGHT, TOP, figure, jpeg_uri, line_chart
from denoising_vit.show.pages.run import render_run, write_run_page
from html_page import Page, is_alone

pytestmark = pytest.mark.usefixtures("one_thread")

#: A random ViT-Ti on a grid of 4 x 4.
FAST = (
    "--weights",
    "random",
    "--backbone",
    "vit_tiny_patch16_224",
    "--size",
    "64",
    "--views",
    "8",
    "--method",
    "exact",
)


@pytest.fixture
def dvit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dvit:
    return in_process(capsys, monkeypatch)


# --- charts ---


def test_a_line_goes_from_corner_to_corner() -> None:
    chart = line_chart("loss", "steps", {"loss": [(0, 1.0), (10, 0.5), (20, 0.0)]})
    assert chart is not None
    assert chart.lines[0].points == ((LEFT, TOP), ((LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2), (RIGHT, BOTTOM))
    assert (chart.lines[0].first, chart.lines[0].last) == (1.0, 0.0)
    assert [label for _, label in chart.down] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert [label for _, label in chart.across] == ["0", "5", "10", "15", "20"]


def test_lines_of_a_chart_share_their_scale() -> None:
    chart = line_chart("", "steps", {"a": [(0, 0.0), (1, 1.0)], "b": [(0, 1.0), (1, 2.0)]})
    assert chart is not None
    assert chart.lines[0].points[-1][1] == chart.lines[1].points[0][1] == (TOP + BOTTOM) / 2


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-9, 1e9])
def test_single_value_is_drawn_in_the_middle(value: float) -> None:
    chart = line_chart("", "steps", {"a": [(5, value)]})
    assert chart is not None and chart.down and chart.across
    assert chart.lines[0].points == (((LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2),)


def test_non_finite_values_are_left_out() -> None:
    assert line_chart("", "steps", {"a": [(0, float("nan"))], "b": []}) is None
    chart = line_chart("", "steps", {"a": [(0, float("inf")), (1, 2.0), (2, 3.0)]})
    assert chart is not None and len(chart.lines[0].points) == 2


def test_long_lines_are_reduced_to_means_of_neighbours() -> None:
    chart = line_chart("", "steps", {"a": [(step, float(step % 2)) for step in range(10 * MOST)]})
    assert chart is not None and len(chart.lines[0].points) == MOST
    assert chart.lines[0].first == chart.lines[0].last == 0.5


def test_figures_have_three_digits() -> None:
    assert [figure(value) for value in (None, 0.0, 0.12345, 1234.5, -0.5)] == ["-", "0", "0.123", "1234", "−0.500"]


# --- runs ---


def look(step: int, cosine: float) -> dict[str, Any]:
    figures = {"cosine": cosine, "raw_cosine": 0.5, "mse": 0.25, "raw_mse": 0.75, "rank": 9.0, "target_rank": 8.0}
    return {"step": step, "kind": "held_out", "ratio": 0.7, "blank_variance": 0.25, **figures}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my <run>"
    (folder / "panels").mkdir(parents=True)
    head = {"format": "denoising-vit/run", "stage": "denoiser", "backbone": {"name": "vit"}, "options": {"steps": 40}}
    (folder / "run.json").write_text(json.dumps(head))
    (folder / "about.json").write_text(json.dumps({"command": "dvit train <photos>", "hardware": "2 CPU cores"}))
    steps = [{"step": step, "kind": "train", "loss": 1.0 / step, "rate": 1e-4} for step in range(1, 31)]
    lines = [*steps, look(10, 0.8), look(20, 0.9), look(30, 0.85)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 40, "ki')
    for step in (10, 20, 30):
        Image.new("RGB", (40, 30)).save(folder / "panels" / f"step-{step:07}.png")
    return folder


def test_run_page_shows_progress_metrics_and_options(run: Path) -> None:
    html = render_run(run)
    page = Page(html)
    assert is_alone(html) and "my <run>" in page.words
    assert "30 of 40 steps; best after step 20: held-out cosine 0.9000 (raw features 0.5000)" in page.words
    assert "MSE 0.750 0.250 -" in page.words and "effective rank - 9.00 8.00" in page.words
    assert "blank images, variance left - 0.250 - " in page.words
    assert "dvit train <photos>" in page.words and "2 CPU cores" in page.words and "options.steps 40" in page.words
    assert len(page.images("features after step")) == 2
    assert len([tag for tag, _ in page.elements if tag == "polyline"]) == 8  # two each for cosine and rank


def test_run_page_shows_the_best_and_the_first_panel(run: Path) -> None:
    words = Page(render_run(run)).words
    assert words.index("held-out images after step 20") < words.index("held-out images after step 10")
    assert "after step 30" not in words.split("Training curves")[0].split("best after step 20", 1)[1]


def test_run_page_before_the_first_evaluation(run: Path) -> None:
    (run / "log.jsonl").write_text('{"step": 1, "kind": "train", "loss": null}\n')
    (run / "about.json").unlink()
    assert "1 of 40 steps; not evaluated yet" in Page(render_run(run)).words


def test_folder_without_a_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="expected a record of a run"):
        write_run_page(tmp_path)
    (run / "run.json").write_text('{"format": "another"}')
    with pytest.raises(EvaluationError, match="expected a run folder"):
        write_run_page(run)
    assert not (run / "run.html").exists()


# --- photos ---


@pytest.fixture(scope="module")
def result() -> Decomposition:
    return denoise_image(planted.backbone(share=0.5), planted.photos(1)[0], views=9, held_out=2)


def row(image: str, **more: Any) -> dict[str, Any]:
    blank = dict.fromkeys(("output", "views", "heldout_r2", "heldout_cosine", "seconds", "note"))
    return {"image": image, "status": "done", **blank, **more}


def test_photos_page_shows_results_maps_and_settings(result: Decomposition) -> None:
    page = PhotosPage("dvit denoise <a>.jpg")
    page.add("<a>.jpg", planted.photos(1)[0], result)
    rows = [
        row("x/<a>.jpg", output="out/a.safetensors", views=9, heldout_r2=0.5, seconds=1.25),
        row("b.jpg", status="failed", note="no photo"),
    ]
    html = page.render(rows, {"method": "exact", "hardware": None}, "vit")
    read = Page(html)
    assert is_alone(html)
    assert "1 photo done, 1 skipped" in read.words and "b.jpg: no photo" in read.words
    assert "<a>.jpg a.safetensors 9 0.500 - 1.25" in read.words and "dvit denoise <a>.jpg" in read.words
    assert "method exact" in read.words and "hardware" not in read.words
    # The kinds that raw features have too, and those that show what was removed.
    for kind in ("PCA", "norm", "k-means", "similarity to ○"):
        assert len(read.images(f"{kind} of")) == 2
    for kind in ("G", "residual norm"):
        assert [image["alt"] for image in read.images(f"{kind} of")] == [f"{kind} of exact features of <a>.jpg"]


def test_stage_1_is_shown_beside_another_method(result: Decomposition) -> None:
    page = PhotosPage(None)
    other = Decomposition(**{**vars_of(result), "info": result.info | {"method": "denoiser"}})
    page.add("a.jpg", planted.photos(1)[0], other, result)
    html = page.render([row("a.jpg")], {}, "vit")
    assert [image["alt"] for image in Page(html).images("PCA of")] == [
        f"PCA of {name} features of a.jpg" for name in ("raw", "denoiser", "exact")
    ]
    assert "<h3>Command</h3>" not in html


@pytest.mark.parametrize("method", ["neural-field", "project"])
def test_photos_page_supports_every_method(result: Decomposition, method: str) -> None:
    page = PhotosPage(None)
    page.add("a.jpg", planted.photos(1)[0], Decomposition(**vars_of(result), info=result.info | {"method": method}))
    found = Page(page.render([row("a.jpg")], {}, "vit"))
    assert [image["alt"] for image in found.images("PCA of")] == [
        f"PCA of {name} features of a.jpg" for name in ("raw", method)
    ]
    assert len(found.images("G of")) == 1


def vars_of(result: Decomposition) -> dict[str, Any]:
    return {name: getattr(result, name) for name in ("field", "artifact", "raw", "size", "patch_size", "stride")}


def test_photos_page_of_a_large_batch_leaves_out_maps(result: Decomposition, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos_module, "MOST", 1)
    page = PhotosPage(None)
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        page.add(name, planted.photos(1)[0], result)
    html = page.render([row(name) for name in ("a.jpg", "b.jpg", "c.jpg")], {}, "vit")
    assert len(Page(html).images("the photo")) == 1 and "Maps of 2 more photos are left out" in Page(html).words
    assert "3 photos done" in Page(html).words


def test_large_photo_is_embedded_as_a_small_jpeg() -> None:
    assert len(jpeg_uri(np.random.default_rng(0).integers(0, 255, (3000, 4000, 3), np.uint8))) < 500_000


def test_denoise_writes_the_report_page(dvit: Dvit, tmp_path: Path) -> None:
    Image.fromarray(planted.photos(1)[0]).save(tmp_path / "a.png")
    (tmp_path / "bad.jpg").write_text("no photo")
    photos = (tmp_path / "a.png", tmp_path / "bad.jpg")
    done = dvit("denoise", *photos, "-o", tmp_path / "out", *FAST, "--report", tmp_path / "pages" / "r.html")
    assert done.code == 1 and "page" in done.words, done.words
    page = Page((tmp_path / "pages" / "r.html").read_text("utf-8"))
    assert "1 photo done, 1 skipped" in page.words and "not an image file" in page.words
    assert page.images("PCA of raw features of a.png") and "vit_tiny_patch16_224" in page.words
    # Results of an earlier run are on the page as well.
    again = dvit("denoise", photos[0], "-o", tmp_path / "out", *FAST, "--report", tmp_path / "again.html")
    assert again.code == 0 and "kept" in again.words
    assert Page((tmp_path / "again.html").read_text("utf-8")).images("PCA of exact features of a.png")


def test_report_name_must_end_in_html(dvit: Dvit, tmp_path: Path) -> None:
    done = dvit("denoise", tmp_path / "a.png", "-o", tmp_path / "out", "--report", tmp_path / "page.pdf")
    assert done.code == 2 and "expected a name ending in .html" in done.words
