"""Evaluation of denoisers: each one gives its own result line, computed from the same raw features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from denoising_vit import DenoisedViT, Denoiser, load_denoiser
from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.backbones.recorded import describe
from denoising_vit.denoiser import denoiser_digest, write_denoiser
from denoising_vit.environment import run_info
from denoising_vit.evaluation.knn import knn
from denoising_vit.evaluation.labelled import LabelledData
from denoising_vit.evaluation.options import KnnOptions
from denoising_vit.evaluation.results import Results
from denoising_vit.evaluation.segmentation import SegmentationOptions, segmentation
from denoising_vit.evaluation.workbench import Workbench
from denoising_vit.extractors import KINDS, Cleaners, parse_names
from tiny_labelled import coloured, colours, tiny_backbone, write_labelled

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = KnnOptions(k=5)
IMAGES = 7


def wide(image: Tensor) -> Tensor:
    """Colours in the first three of 64 channels, noise in all others: (B, 3, H, W) -> (B, h, w, 64)."""
    clean = colours(image)
    noise = 8 * (torch.frac(clean.abs().sum(-1, keepdim=True) * torch.arange(997, 1058)) - 0.5)
    return torch.cat([clean, noise], -1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LabelledData:
    return write_labelled(tmp_path_factory.mktemp("coloured"), coloured(3, 0), coloured(4, 1))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone(wide)


def denoiser_of(backbone: Backbone, *, kept: bool, grid: tuple[int, int] = (6, 6)) -> Denoiser:
    """A denoiser that returns features unchanged, or, unless ``kept``, adds position embeddings to the colours."""
    denoiser = Denoiser(64, grid, trained_for=describe(backbone)).requires_grad_(False)
    for value in denoiser.parameters():
        value.zero_()
    if not kept:
        denoiser.pos_embed[..., :3] = torch.linspace(-3, 3, grid[0] * grid[1])[:, None]
    return denoiser


@pytest.fixture
def files(tmp_path: Path, backbone: Backbone) -> dict[str, Path]:
    paths = {}
    for name, kept in (("same", True), ("other", False)):
        paths[name] = tmp_path / f"{name}.safetensors"
        write_denoiser(denoiser_of(backbone, kept=kept), paths[name])
    return paths


@pytest.fixture
def bench(tmp_path: Path, data: LabelledData, backbone: Backbone) -> Workbench:
    return Workbench(
        data=data,
        backbone=backbone,
        spec=BackboneSpec("tiny"),
        results=Results(tmp_path / "results.jsonl"),
        folder=tmp_path / "cache",
        run=run_info(["evaluate"]),
    )


def cached(folder: Path) -> int:
    """Number of images whose features are on disk, counted once for each source."""
    return len(list((folder / "cache" / "features").rglob("*.safetensors")))


def test_denoiser_is_a_known_kind_of_features() -> None:
    assert "denoiser" in KINDS
    assert parse_names("raw,denoiser", KINDS) == ("raw", "denoiser")


def test_denoiser_line_is_compared_with_raw_features(tmp_path: Path, bench: Workbench, files: dict[str, Path]) -> None:
    with_it = replace(bench, cleaners=Cleaners(denoiser=str(files["same"])))
    (raw, _), (line, kept) = knn(with_it, ["raw", "denoiser"], FEW)
    assert not kept and line["failed"] is None and line["features"] == "denoiser"
    assert line["metrics"] == raw["metrics"]  # this denoiser returns features unchanged
    assert line["paired"]["against"] == "raw" and line["paired"]["difference"] == 0
    assert line["settings"]["features"] == {"denoiser": denoiser_digest(load_denoiser(files["same"]))}
    assert raw["settings"]["features"] == {}
    assert cached(tmp_path) == IMAGES  # the denoiser uses the cached raw features


def test_another_denoiser_gives_another_line_from_the_same_raw_features(
    tmp_path: Path, bench: Workbench, files: dict[str, Path]
) -> None:
    lines = []
    for name in ("same", "other"):
        ((line, kept),) = knn(replace(bench, cleaners=Cleaners(denoiser=str(files[name]))), ["denoiser"], FEW)
        assert not kept and line["failed"] is None
        assert cached(tmp_path) == IMAGES
        lines.append(line)
    assert lines[0]["settings"]["features"] != lines[1]["settings"]["features"]
    assert lines[0]["metrics"]["mIoU"] != lines[1]["metrics"]["mIoU"]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


def test_metrics_match_an_extractor_built_by_hand(bench: Workbench, backbone: Backbone, files: dict[str, Path]) -> None:
    extractor = DenoisedViT(backbone, load_denoiser(files["other"]))
    both = replace(bench, cleaners=Cleaners(denoiser=str(files["other"])), extractors={"by hand": extractor})
    (line, _), (by_hand, _) = knn(both, ["denoiser", "by hand"], FEW)
    assert line["failed"] is by_hand["failed"] is None
    assert line["metrics"] == by_hand["metrics"]


def test_renamed_denoiser_file_is_not_evaluated_again(tmp_path: Path, bench: Workbench, files: dict[str, Path]) -> None:
    ((first, _),) = knn(replace(bench, cleaners=Cleaners(denoiser=str(files["other"]))), ["denoiser"], FEW)
    moved = files["other"].rename(tmp_path / "moved.safetensors")
    assert list(knn(replace(bench, cleaners=Cleaners(denoiser=str(moved))), ["denoiser"], FEW)) == [(first, True)]
    assert cached(tmp_path) == IMAGES


def test_linear_probes_accept_a_denoiser(bench: Workbench, files: dict[str, Path]) -> None:
    quick = SegmentationOptions(seeds=(0,), steps=4, batch=2)
    with_it = replace(bench, cleaners=Cleaners(denoiser=str(files["other"])))
    results = list(segmentation(with_it, ["raw", "denoiser"], quick))
    assert [(line["features"], line["failed"]) for line, _ in results] == [("raw", None), ("denoiser", None)]


def test_missing_denoiser_fails_and_raw_is_still_evaluated(bench: Workbench, files: dict[str, Path]) -> None:
    (raw, _), (line, _) = knn(bench, ["raw", "denoiser"], FEW)
    assert raw["failed"] is None and raw["metrics"]["mIoU"] > 0
    assert "; train one with dvit train and pass it with --denoiser FILE" in line["failed"]
    again = list(knn(replace(bench, cleaners=Cleaners(denoiser=str(files["same"]))), ["raw", "denoiser"], FEW))
    assert [(found["failed"], kept) for found, kept in again] == [(None, True), (None, False)]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("none.safetensors", "none.safetensors: no such denoiser file"),
        ("voc_denoised", "no voc_denoised was published for wide"),
        ("voc_distilled", "voc_distilled is a whole model"),
    ],
)
def test_unavailable_denoiser_fails_and_raw_is_still_evaluated(given: str, reason: str, bench: Workbench) -> None:
    (raw, _), (line, _) = knn(replace(bench, cleaners=Cleaners(denoiser=given)), ["raw", "denoiser"], FEW)
    assert raw["failed"] is None
    assert reason in line["failed"] and not line["failed"].startswith(("DenoiserError", "FormatError"))


def test_denoiser_of_another_backbone_fails_with_a_reason(tmp_path: Path, bench: Workbench) -> None:
    other = tiny_backbone(lambda image: wide(image).flip(-1))
    write_denoiser(denoiser_of(other, kept=True), tmp_path / "of another.safetensors")
    given = str(tmp_path / "of another.safetensors")
    (raw, _), (line, _) = knn(replace(bench, cleaners=Cleaners(denoiser=given)), ["raw", "denoiser"], FEW)
    assert raw["failed"] is None
    assert "the denoiser was trained for " in line["failed"] and "wide" in line["failed"]


# Digests


def test_digest_is_of_the_values_as_stored_in_files(files: dict[str, Path], backbone: Backbone) -> None:
    made = denoiser_of(backbone, kept=False)
    assert denoiser_digest(made) == denoiser_digest(load_denoiser(files["other"]))
    made.denoiser.get_parameter("mlp.fc2.bias")[5] = 0.25
    assert denoiser_digest(made) != denoiser_digest(load_denoiser(files["other"]))


def test_digest_distinguishes_grids_with_the_same_values(backbone: Backbone) -> None:
    """The same values, row by row, belong to other positions."""
    wide_grid, tall_grid = (denoiser_of(backbone, kept=False, grid=grid) for grid in ((2, 18), (18, 2)))
    features = torch.zeros(1, 6, 6, 64)
    assert not torch.allclose(wide_grid(features), tall_grid(features))
    assert denoiser_digest(wide_grid) != denoiser_digest(tall_grid)
