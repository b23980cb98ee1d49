"""`dvit reproduce`: which published rows can be measured, what is missing for the others, and the steps themselves."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from command import Dvit, in_process
from denoising_vit import reproduction
from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.backbones.timm_vit import TimmBackbone
from denoising_vit.denoiser import load_denoiser
from denoising_vit.denoiser.options import TrainOptions
from denoising_vit.denoiser.published import published_rows
from denoising_vit.errors import PhotoError
from denoising_vit.evaluation import depth
from denoising_vit.evaluation.options import recorded
from denoising_vit.evaluation.results import METRICS
from denoising_vit.evaluation.segmentation import PAPER, RELEASED
from denoising_vit.evaluation.segmentation import evaluate as segmenting
from denoising_vit.evaluation.workbench import Task, Workbench
from denoising_vit.reproduction import DenoiserRecipe, DistilledRecipe, Protocols, Row, Step, dry, find_row, running
from denoising_vit.reproduction.rows import ADE, IMAGENET_PHOTOS, NYU, VOC, VOC_PHOTOS, TrainingPhotos
from denoising_vit.reproduction.running import training_photos
from denoising_vit.training.loop import peak_rate
from denoising_vit.training.samples import Sampler, whole_view
from tiny_distillation import blank_panels
from tiny_labelled import tiny_backbone

pytestmark = pytest.mark.usefixtures("one_thread")

Line = dict[str, Any]

SMALL = "vit_small_patch14_dinov2.lvd142m"

#: All variants of this model were published.
DINOV2_B = "vit_base_patch14_dinov2.lvd142m"

#: No depth results were published for the pretrained model.
EVA = "eva02_base_patch16_clip_224.merged2b"

#: Two steps on crops of a few patches.
TINY = replace(PAPER, steps=2, warmup=1, batch=2, short_side=56, long_side=224, crop=56, window=56, window_stride=37)

#: The same for depth; photos are evaluated once, without mirroring.
TINY_DEPTH = replace(depth.PAPER, steps=2, warmup=1, batch=1, bins=16, crop=(64, 64), flip_test=False)

BASELINES = [row.model for row in published_rows() if row.variant == "baseline"]

#: One model of each architecture.
DISTILLED = [row.model for row in published_rows() if row.variant == "voc_distilled"]


@pytest.fixture
def dvit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dvit:
    return in_process(capsys, monkeypatch)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dry.dry_data(tmp_path_factory.mktemp("written") / "data")


@pytest.fixture
def data(written: Path, tmp_path: Path) -> Path:
    """A copy of images in the layouts of VOC 2012, ADE20K and NYUv2."""
    return Path(shutil.copytree(written, tmp_path / "data"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "reproduced.jsonl"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[BackboneSpec]:
    """Replace every model by mean colours and the protocols by tiny ones; return the specs of the loaded models."""
    loaded: list[BackboneSpec] = []

    def load(spec: BackboneSpec) -> Backbone:
        loaded.append(spec)
        return tiny_backbone()

    monkeypatch.setattr(BackboneSpec, "load", load)
    monkeypatch.setattr(reproduction, "Protocols", lambda: Protocols(TINY, TINY_DEPTH))
    return loaded


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dry runs with models of 128 channels."""
    monkeypatch.setattr(dry, "build_timm_model", partial(dry.build_timm_model, embed_dim=128, num_heads=2))


@pytest.fixture
def tiny(narrow: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dry runs with tiny protocols."""
    real = dry.dry_protocols
    monkeypatch.setattr(dry, "dry_protocols", lambda model: replace(real(model), segmentation=TINY, depth=TINY_DEPTH))
    with blank_panels():
        yield


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_spec: BackboneSpec) -> Backbone:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(BackboneSpec, "load", load)


def lines_of(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names_of(path: Path) -> list[str]:
    """Names of the data sets that were measured."""
    return [line["settings"]["data"]["name"] for line in lines_of(path) if not line["failed"]]


def listed(dvit: Dvit, data: Path, out: Path) -> dict[tuple[str, str], str]:
    """Status by model and variant, as printed by `--list`."""
    done = dvit("reproduce", "--list", "--data", data, "-o", out)
    assert done.code == 0, done.err
    rows = [line.split(maxsplit=2) for line in done.out.splitlines()[1:] if line.strip()]
    return {(model, variant): status.strip() for model, variant, status in rows}


# --- the list ---


@pytest.mark.usefixtures("no_model")
def test_list_shows_every_published_row_with_the_status_of_its_steps(dvit: Dvit, tmp_path: Path, out: Path) -> None:
    found = listed(dvit, tmp_path / "data", out)
    assert list(found) == [(row.model, row.variant) for row in published_rows()]
    assert len(found) == 34
    for row in published_rows():
        segmented, with_depth = "VOC 2012 missing, ADE20K missing", ", NYUv2 depth missing"
        without = (row.model, row.variant) in ((EVA, "baseline"), (EVA, "voc_distilled"))  # no depth was published
        assert found[row.model, row.variant] == segmented + ("" if without else with_depth)
    assert not out.exists()


def test_list_prints_each_reason_once(dvit: Dvit, tmp_path: Path, out: Path) -> None:
    printed = dvit("reproduce", "--list", "--data", tmp_path / "data", "-o", out).err
    assert printed.count(f"VOC 2012: {tmp_path / 'data' / 'VOCdevkit' / 'VOC2012'} lacks JPEGImages") == 1
    lacking = f"NYUv2 depth: {tmp_path / 'data' / 'nyu'} lacks nyu_train.txt, nyu_test.txt; source: "
    assert printed.count(lacking + "https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html") == 1
    assert len(printed.splitlines()) == len(set(printed.splitlines()))


def test_list_shows_available_data_as_ready(dvit: Dvit, data: Path, out: Path) -> None:
    shutil.rmtree(data / ADE.place)
    found = listed(dvit, data, out)
    assert found[SMALL, "baseline"] == "VOC 2012 ready, ADE20K missing, NYUv2 depth ready"
    assert found[EVA, "baseline"] == "VOC 2012 ready, ADE20K missing"


@pytest.mark.parametrize("lacking", ["nyu_train.txt", "nyu_test.txt"])
def test_depth_data_without_one_of_its_lists_is_missing(dvit: Dvit, data: Path, out: Path, lacking: str) -> None:
    (data / NYU.place / lacking).unlink()
    status = listed(dvit, data, out)[SMALL, "baseline"]
    assert status == "VOC 2012 ready, ADE20K ready, NYUv2 depth missing"
    printed = dvit("reproduce", "--list", "--data", data, "-o", out).err
    assert f"NYUv2 depth: {data / NYU.place} lacks {lacking}; source: https://cs.nyu.edu/" in printed


def test_denoised_depth_needs_the_training_photos_of_the_denoiser(dvit: Dvit, data: Path, out: Path) -> None:
    shutil.rmtree(data / VOC.place)
    assert listed(dvit, data, out)[EVA, "voc_denoised"] == "VOC 2012 missing, ADE20K missing, NYUv2 depth missing"
    printed = dvit("reproduce", "--list", "--data", data, "-o", out).err
    assert (
        f"NYUv2 depth: the denoiser is trained on {data / VOC.place / 'JPEGImages'}, which is missing; source: "
        in printed
    )


def test_list_rejects_a_file_without_results(dvit: Dvit, data: Path, out: Path) -> None:
    out.write_text("buy milk\nand bread\n")
    done = dvit("reproduce", "--list", "--data", data, "-o", out)
    assert done.code == 2
    assert str(out) in done.err


# --- missing data and invalid options ---


@pytest.mark.usefixtures("no_model")
def test_row_without_data_names_missing_files_their_place_and_source(dvit: Dvit, tmp_path: Path, out: Path) -> None:
    done = dvit("reproduce", "--row", SMALL, "--data", tmp_path / "data", "-o", out)
    assert done.code == 2
    voc, ade, nyu = (tmp_path / "data" / place for place in ("VOCdevkit/VOC2012", "ADEChallengeData2016", "nyu"))
    assert f"{voc} lacks JPEGImages, SegmentationClass, ImageSets/Segmentation/train.txt" in done.err
    assert "VOCtrainval_11-May-2012.tar, http://host.robots.ox.ac.uk/pascal/VOC/voc2012/" in done.err
    assert f"{ade} lacks images/training, images/validation, annotations/training" in done.err
    assert "ADEChallengeData2016.zip, http://data.csail.mit.edu/places/ADEchallenge/" in done.err
    assert f"{nyu} lacks nyu_train.txt, nyu_test.txt" in done.err
    assert "https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html, as photos, 16-bit depth and lists" in done.err
    assert f"no step can run for {SMALL}, baseline" in done.err
    assert not out.exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("more", [(), ("--dry",)])
def test_unknown_row_suggests_similar_names(dvit: Dvit, data: Path, out: Path, more: tuple[str, ...]) -> None:
    done = dvit("reproduce", "--row", "vit_small_patch14_dinov2", "--data", data, "-o", out, *more)
    assert done.code == 2
    assert f"did you mean {SMALL}" in done.err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("more", [(), ("--dry",)])
def test_unknown_variant_lists_the_valid_ones(dvit: Dvit, data: Path, out: Path, more: tuple[str, ...]) -> None:
    done = dvit("reproduce", "--row", SMALL, "--variant", "denoised", "--data", data, "-o", out, *more)
    assert done.code == 2
    assert "got 'denoised'" in done.err
    for variant in ("baseline", "voc_denoised", "imgnet_distilled"):
        assert variant in done.err


@pytest.mark.usefixtures("no_model")
def test_unpublished_variant_of_a_model_is_rejected(dvit: Dvit, data: Path, out: Path) -> None:
    done = dvit("reproduce", "--row", SMALL, "--variant", "voc_distilled", "--data", data, "-o", out)
    assert done.code == 2
    assert "(baseline, voc_denoised), got 'voc_distilled'" in done.err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("variant", "lacking", "reason"),
    [
        ("voc_distilled", IMAGENET_PHOTOS, "the model is distilled on"),
        ("imgnet_denoised", IMAGENET_PHOTOS, "the denoiser is trained on"),
        ("imgnet_distilled", IMAGENET_PHOTOS, "the denoiser is trained on"),
    ],
)
def test_missing_training_photos_are_reported(
    dvit: Dvit, data: Path, out: Path, variant: str, lacking: TrainingPhotos, reason: str
) -> None:
    shutil.rmtree(data / lacking.places[0])
    done = dvit("reproduce", "--row", DINOV2_B, "--variant", variant, "--data", data, "-o", out)
    assert done.code == 2
    assert f"{reason} {data / lacking.places[0]}, which is missing; source: {lacking.source}" in done.err
    assert "published measured" not in done.words  # no empty table
    assert not out.exists()


def test_training_photos_are_the_first_of_the_released_list(data: Path) -> None:
    names = ["VOC2007/JPEGImages/000001.jpg", "VOC2012/JPEGImages/train_1.jpg", "VOC2012/JPEGImages/train_0.jpg"]
    (data / "voc_train.txt").write_text("".join(f"data/VOCdevkit/{name}\n" for name in names))
    photos = training_photos(data, VOC_PHOTOS, 2)
    assert [item.id for item in photos] == ["VOC2007/000001.jpg", "VOC2012/train_1.jpg"]
    assert [item.url for item in photos] == [str((data / "VOCdevkit" / name).absolute()) for name in names[:2]]
    assert len(training_photos(data, VOC_PHOTOS)) == len(training_photos(data, VOC_PHOTOS, 10_000)) == 3


def test_missing_photo_and_empty_list_raise(data: Path) -> None:
    (data / VOC_PHOTOS.places[1] / "000001.jpg").unlink()
    with pytest.raises(PhotoError, match=r"voc_train.txt: 1 of 4 photos are missing, such as .*2007/JPEGImages/000001"):
        training_photos(data, VOC_PHOTOS)
    (data / "voc_train.txt").write_text("")
    with pytest.raises(PhotoError, match=r"voc_train.txt: the list is empty; source: data/voc_train.txt of"):
        training_photos(data, VOC_PHOTOS)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("variant", ["voc_denoised", "voc_distilled"])
def test_missing_photo_list_is_reported_with_its_source(dvit: Dvit, data: Path, out: Path, variant: str) -> None:
    (data / "voc_train.txt").unlink()
    done = dvit("reproduce", "--row", DINOV2_B, "--variant", variant, "--data", data, "-o", out)
    assert done.code == 2
    assert (
        f"on the first photos of the list {data / 'voc_train.txt'}, which is missing; source: data/voc_train.txt"
        in done.err
    )


def test_unlisted_photos_are_spread_evenly_without_validation_photos(data: Path) -> None:
    unlisted = replace(VOC_PHOTOS, listed=None)
    photos = training_photos(data, unlisted)
    assert [item.id for item in photos] == [
        *("VOC2012/train_0.jpg", "VOC2012/train_1.jpg", "VOC2007/000000.jpg", "VOC2007/000001.jpg"),
    ]
    assert [item.id for item in training_photos(data, unlisted, 2)] == ["VOC2012/train_1.jpg", "VOC2007/000001.jpg"]


def test_row_is_required(dvit: Dvit, data: Path, out: Path) -> None:
    done = dvit("reproduce", "--data", data, "-o", out)
    assert done.code == 2
    assert "(see `dvit reproduce --list`)" in done.err


def test_negative_seed_is_refused(dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path) -> None:
    done = dvit("reproduce", "--row", SMALL, "--data", data, "-o", out, "--seed", -1)
    assert done.code == 2
    assert "seed" in done.err and "-1" in done.err
    assert small == []  # reported before the model is loaded


def test_unwritable_results_are_reported_before_the_model_is_loaded(
    dvit: Dvit, small: list[BackboneSpec], data: Path
) -> None:
    done = dvit("reproduce", "--row", SMALL, "--data", data, "-o", data)
    assert done.code == 2
    assert f"cannot write results to {data}" in done.err
    assert small == []


# --- measuring ---


def test_every_step_writes_a_line_of_results(dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path) -> None:
    done = dvit("reproduce", "--row", SMALL, "--data", data, "-o", out, "--device", "cpu")
    assert done.code == 0, done.err
    assert [(spec.backbone, spec.weights, spec.device) for spec in small] == [(SMALL, "hub", "cpu")]
    wanted = ("segmentation", "voc2012", 2), ("segmentation", "ade20k", 2), ("depth", "nyu", 1)
    for line, (task, layout, images) in zip(lines_of(out), wanted, strict=True):
        assert (line["task"], line["features"], line["failed"]) == (task, "raw", None)
        assert line["published"] == {"model": SMALL, "variant": "baseline"}
        assert line["settings"]["data"]["layout"] == layout
        assert line["settings"]["normalisation"] == "imagenet"
        assert line["images"] == {"train": images, "val": images}


def test_measured_metrics_are_printed_beside_the_published_ones(
    dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path
) -> None:
    done = dvit("reproduce", "--row", SMALL, "--data", data, "-o", out)
    voc, ade, nyu = (line["metrics"] for line in lines_of(out))
    wanted = [
        ("VOC 2012", "mIoU", "81.78", f"{voc['mIoU']:.2f}"),
        ("VOC 2012", "mAcc", "88.44", f"{voc['mAcc']:.2f}"),
        ("ADE20K", "mIoU", "44.05", f"{ade['mIoU']:.2f}"),
        ("ADE20K", "mAcc", "55.53", f"{ade['mAcc']:.2f}"),
        ("NYUv2 depth", "RMSE", "0.4340", f"{nyu['RMSE']:.4f}"),
        ("NYUv2 depth", "AbsRel", "0.1331", f"{nyu['AbsRel']:.4f}"),
        ("NYUv2 depth", "a1", "84.49", f"{nyu['a1']:.2f}"),
    ]
    rows = [line.split() for line in done.out.splitlines() if line.startswith(SMALL + " ")]
    assert rows == [[SMALL, "baseline", *name.split(), *figures] for name, *figures in wanted]
    assert f"{SMALL} on VOC 2012: mIoU {voc['mIoU']:.2f}" in done.err
    assert f"{SMALL} on NYUv2 depth: RMSE {nyu['RMSE']:.4f}" in done.err


def test_second_call_keeps_results_and_the_list_says_done(
    dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("reproduce", "--row", SMALL, "--data", data, "-o", out)
    first = dvit(*command)
    before = out.read_bytes()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(segmenting, "linear_segmentation", never)
    monkeypatch.setattr(depth.LinearDepth, "probes", never)
    again = dvit(*command)
    assert (again.code, again.out, out.read_bytes()) == (first.code, first.out, before)
    found = listed(dvit, data, out)
    assert found[SMALL, "baseline"] == "VOC 2012 done, ADE20K done, NYUv2 depth done"
    for other in ((SMALL, "voc_denoised"), ("vit_base_patch16_224.mae", "baseline")):
        assert found[other] == "VOC 2012 ready, ADE20K ready, NYUv2 depth ready"


def test_report_shows_measured_beside_published_metrics(
    dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path, tmp_path: Path
) -> None:
    dvit("reproduce", "--row", SMALL, "--data", data, "-o", out)
    done = dvit("report", out, "-o", tmp_path / "results.md")
    assert done.code == 0, done.err
    text = (tmp_path / "results.md").read_text().split("## Published and measured")[1]
    assert "not compared" not in text
    wanted = [
        ("### VOC", {"mIoU": 2, "mAcc": 2}, "81.78 88.44"),
        ("### ADE20K", {"mIoU": 2, "mAcc": 2}, "44.05 55.53"),
        ("### NYU depth", {"RMSE": 4, "AbsRel": 4, "a1": 2}, "0.4340 0.1331 84.49"),
    ]
    for line, (heading, digits, published) in zip(lines_of(out), wanted, strict=True):
        part = text.split(heading)[1].split("###")[0]
        (row,) = [row for row in part.splitlines() if row.startswith(f"| {SMALL} | baseline")]
        figures = [f"{line['metrics'][metric]:.{decimals}f}" for metric, decimals in digits.items()]
        cells = [cell.strip() for cell in row.split("|")[3:]]
        assert cells[: 2 * len(digits)] == [*itertools.chain(*zip(published.split(), figures, strict=True))]


def test_only_available_benchmarks_are_measured(dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path) -> None:
    shutil.rmtree(data / VOC.place)
    done = dvit("reproduce", "--row", SMALL, "--data", data, "-o", out)
    assert done.code == 1
    assert names_of(out) == ["ADE20K", "nyu"]
    assert f"VOC 2012: {data / VOC.place} lacks JPEGImages" in done.err
    assert " VOC 2012 " not in done.out


def test_row_without_depth_data_exits_1(dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path) -> None:
    shutil.rmtree(data / NYU.place)
    done = dvit("reproduce", "--row", SMALL, "--data", data, "-o", out)
    assert done.code == 1
    assert names_of(out) == ["VOC 2012", "ADE20K"]
    assert f"NYUv2 depth: {data / NYU.place} lacks nyu_train.txt, nyu_test.txt" in done.err
    assert "NYUv2" not in done.out


def test_row_without_published_depth_needs_no_depth_data(
    dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path
) -> None:
    shutil.rmtree(data / NYU.place)
    done = dvit("reproduce", "--row", EVA, "--data", data, "-o", out)
    assert done.code == 0, done.err
    assert names_of(out) == ["VOC 2012", "ADE20K"]
    assert "NYU" not in done.out + done.err


def test_images_without_masks_are_reported_and_exit_1(
    dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path
) -> None:
    (data / VOC.place / "SegmentationClass" / "val_1.png").unlink()
    done = dvit("reproduce", "--row", EVA, "--data", data, "-o", out)
    assert lines_of(out)[0]["images"] == {"train": 2, "val": 1}
    assert "val_1" in done.err  # with half of the images this is not the published benchmark
    assert done.code == 1


def test_benchmark_without_any_mask_fails_and_the_others_are_measured(
    dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path
) -> None:
    for mask in (data / VOC.place / "SegmentationClass").iterdir():
        mask.unlink()
    done = dvit("reproduce", "--row", SMALL, "--data", data, "-o", out)
    assert "none of 2 is usable" in done.err
    assert str(data / VOC.place) in done.err
    assert names_of(out) == ["ADE20K", "nyu"]
    assert done.code == 1


def shallow(nyu: Path) -> None:
    Image.new("L", (640, 480), 100).save(nyu / "scene" / "depth_train.png")


def cropped(nyu: Path) -> None:
    for name in ("rgb_test.jpg", "depth_test.png"):
        with Image.open(nyu / "scene" / name) as image:
            part = image.crop((0, 0, 561, 427))
        part.save(nyu / "scene" / name)


def without_photos(nyu: Path) -> None:
    (nyu / "scene" / "rgb_train.jpg").unlink()


def with_depth_in_the_border_alone(nyu: Path) -> None:
    depths = np.zeros((480, 640), np.uint16)
    depths[:45] = 2000
    Image.fromarray(depths).save(nyu / "scene" / "depth_test.png")


def with_an_empty_list(nyu: Path) -> None:
    (nyu / "nyu_test.txt").write_text("\n")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (shallow, "split train, but none of 1 is usable; first reason: scene/rgb_train.jpg: "),
        (cropped, "scene/rgb_test.jpg: expected 640 x 480 pixels, as NYUv2 has, got 561 x 427"),
        (without_photos, "split train, but none of 1 is usable; first reason: scene/rgb_train.jpg: "),
        (with_depth_in_the_border_alone, "none of 1 items has a value of RMSE"),
        (with_an_empty_list, "nyu_test.txt: expected a photo, a depth map and a focal length per line, found none"),
    ],
)
def test_broken_depth_data_fails_and_the_others_are_measured(
    dvit: Dvit,
    small: list[BackboneSpec],
    data: Path,
    out: Path,
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    damage(data / NYU.place)
    done = dvit("reproduce", "--row", SMALL, "--data", data, "-o", out)
    assert done.code == 1
    (message,) = [line for line in done.err.splitlines() if "failed" in line]
    assert message.startswith("NYUv2 depth failed: ") and reason in message
    assert names_of(out) == ["VOC 2012", "ADE20K"]
    rows = [line.split()[2:] for line in done.out.splitlines() if " NYUv2 depth " in line]
    assert rows == [
        ["NYUv2", "depth", *figures]
        for figures in (("RMSE", "0.4340", "-"), ("AbsRel", "0.1331", "-"), ("a1", "84.49", "-"))
    ]


def test_photos_without_depth_are_reported_and_exit_1(
    dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path
) -> None:
    with (data / NYU.place / "nyu_test.txt").open("a") as listed:
        listed.write("/scene/rgb_lost.jpg /scene/depth_lost.png 518.8579\n")
    done = dvit("reproduce", "--row", SMALL, "--data", data, "-o", out)
    assert lines_of(out)[2]["images"] == {"train": 1, "val": 1}
    assert "NYUv2 depth skipped: val/scene/rgb_lost.jpg" in done.err
    assert done.code == 1


@pytest.mark.parametrize("stopped_in", [2, 3])
def test_interrupt_keeps_finished_steps(
    dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path, monkeypatch: pytest.MonkeyPatch, stopped_in: int
) -> None:
    segment, probes = segmenting.linear_segmentation, depth.LinearDepth.probes
    begun: list[str] = []

    def begin(name: str) -> None:
        begun.append(name)
        if len(begun) == stopped_in:
            raise KeyboardInterrupt

    def segmented(source: Any, labelled: Any, *rest: Any, **more: Any) -> Any:
        begin(labelled.name)
        return segment(source, labelled, *rest, **more)

    def probed(self: depth.LinearDepth, seeds: Sequence[int]) -> Any:
        begin(self.data.name)
        return probes(self, seeds)

    monkeypatch.setattr(segmenting, "linear_segmentation", segmented)
    monkeypatch.setattr(depth.LinearDepth, "probes", probed)
    command = ("reproduce", "--row", SMALL, "--data", data, "-o", out)
    stopped = dvit(*command)
    names = ["VOC 2012", "ADE20K", "nyu"]
    assert stopped.code == 130
    assert "finished steps are kept" in stopped.err
    assert names_of(out) == names[: stopped_in - 1]
    assert dvit(*command).code == 0
    assert begun == names[:stopped_in] + names[stopped_in - 1 :]
    assert names_of(out) == names


def test_each_seed_is_measured_separately(dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path) -> None:
    for seed in (0, 1):
        dvit("reproduce", "--row", SMALL, "--data", data, "-o", out, "--seed", seed)
    assert [line["seeds"][0]["seed"] for line in lines_of(out)] == [0, 0, 0, 1, 1, 1]


# --- dry runs ---


def assert_dry(dvit: Dvit, model: str, folder: Path, variant: str = "baseline", *, with_depth: bool = True) -> None:
    """Run all benchmarks of a row end to end and check that no file is kept."""
    row = "--row", model, "--variant", variant
    done = dvit("reproduce", "--dry", *row, "--device", "cpu", "-o", folder / "reproduced.jsonl")
    assert done.code == 0, done.err
    assert "the measured scores are meaningless" in done.words
    rows = [line.split() for line in done.out.splitlines() if line.startswith(model)]
    wanted = [("VOC", "mIoU"), ("VOC", "mAcc"), ("ADE20K", "mIoU"), ("ADE20K", "mAcc")]
    if with_depth:
        wanted += [("NYUv2", "RMSE"), ("NYUv2", "AbsRel"), ("NYUv2", "a1")]
    assert [(row[2], row[-3]) for row in rows] == wanted
    assert all(0 <= float(row[-1]) <= 100 for row in rows)
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("narrow")
def test_dry_run_follows_the_published_protocols(dvit: Dvit, tmp_path: Path) -> None:
    assert_dry(dvit, SMALL, tmp_path)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("model", [SMALL, EVA])  # for EVA-02, depth was published only with a denoiser
def test_a_denoiser_is_fitted_trained_and_probed(
    dvit: Dvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    judged: list[str] = []
    compare = Workbench.compare

    def note(self: Workbench, names: Sequence[str], task: Task) -> Iterator[Any]:
        info = load_denoiser(str(self.cleaners.denoiser), backbone=self.backbone).info
        judged.append(f"{task.name}: {names[0]} after step {info['step']}, {info['images']} images")
        return compare(self, names, task)

    monkeypatch.setattr(Workbench, "compare", note)
    assert_dry(dvit, model, tmp_path, "voc_denoised")
    tasks = "segmentation", "segmentation", "depth"
    assert judged == [f"{task}: denoiser after step 2, 3 images" for task in tasks]  # one of four photos is held out


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("model", DISTILLED)
def test_a_model_of_each_architecture_is_denoised_distilled_and_probed(
    dvit: Dvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    judged: list[str] = []
    compare = Workbench.compare

    def note(self: Workbench, names: Sequence[str], task: Task) -> Iterator[Any]:
        with safe_open(str(self.cleaners.distilled), framework="pt") as file:
            record = json.loads(file.metadata()["denoising_vit"])
        judged.append(f"{task.name}: {names[0]} after step {record['step']}, {record['info']['photos']} photos")
        return compare(self, names, task)

    monkeypatch.setattr(Workbench, "compare", note)
    assert_dry(dvit, model, tmp_path, "voc_distilled", with_depth=model != EVA)
    tasks = ["segmentation", "segmentation", "depth"][: 2 if model == EVA else 3]
    assert judged == [f"{task}: distilled after step 2, 3 photos" for task in tasks]  # one of four is held out


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("variant", ["imgnet_denoised", "imgnet_distilled"])
def test_imagenet_variants_are_trained_on_imagenet_photos(
    dvit: Dvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    trained: list[tuple[str, ...]] = []
    fit = running.trained_denoiser

    def note(backbone: Backbone, data: Path, where: TrainingPhotos, *rest: Any) -> Path:
        trained.append(where.places)
        return fit(backbone, data, where, *rest)

    monkeypatch.setattr(running, "trained_denoiser", note)
    assert_dry(dvit, DINOV2_B, tmp_path, variant)
    assert trained == [IMAGENET_PHOTOS.places]


def test_recipe_of_distilled_models_is_the_released_one() -> None:
    recipe, training = DistilledRecipe(), DistilledRecipe().training
    assert (training.epochs, training.steps, training.hold_prefix, training.precision) == (5, 0, 0, "float32")
    assert (recipe.views.whole, recipe.views.sizes, recipe.views.flip) == (1, None, 0.5)
    assert (training.batch_size, training.views_a_step(1)) == (64, 512)
    assert peak_rate(training.learning_rate, 512) == pytest.approx(2.83e-4, rel=1e-3)


def test_recipe_of_denoisers_is_the_released_one() -> None:
    recipe, training = DenoiserRecipe(), DenoiserRecipe().training
    assert (training.steps, training.start, training.precision, training.held_out) == (50_000, "random", "float32", 1)
    assert (training.batch_size, training.views_a_step(1)) == (16, 128)
    assert peak_rate(training.learning_rate, 128) == pytest.approx(1.41e-4, rel=5e-3)
    assert recipe.images == 10_000
    sampler = Sampler((3, 5, 7), ((56, 56),), recipe.views, 0, 3)
    shown = [sample for step in range(20) for sample in sampler.step(step)]
    assert {sample.crop for sample in shown} == {whole_view((56, 56), mirrored=False)}  # never a crop, never mirrored


def test_protocols_are_the_released_ones() -> None:
    assert Protocols() == Protocols(RELEASED, depth.RELEASED, DenoiserRecipe(), DistilledRecipe())
    assert replace(RELEASED, pads="cut") == PAPER
    assert replace(depth.RELEASED, pads="cut", together=None, gradient=0.5) == depth.PAPER
    assert (depth.RELEASED.together, depth.RELEASED.gradient) == (2, 0)


def test_later_settings_are_recorded_only_when_they_have_an_effect() -> None:
    """So that earlier results are kept and earlier runs can be resumed."""
    for ours, released in ((PAPER, RELEASED), (depth.PAPER, depth.RELEASED)):
        assert not {"pads", "together"} & recorded(ours).keys()
        assert recorded(released)["pads"] == "stretched"
    assert recorded(depth.RELEASED)["together"] == 2
    assert not {"accumulate", "blank", "start"} & TrainOptions(blank=0.0).recorded().keys()
    training = DenoiserRecipe().training.recorded()
    assert (training["accumulate"], training["start"]) == (8, "random")


def test_dry_protocols_differ_from_released_ones_only_in_length() -> None:
    how = dry.dry_protocols(tiny_backbone())
    short = how.segmentation
    assert replace(short, steps=PAPER.steps, warmup=PAPER.warmup, batch=PAPER.batch) == RELEASED
    released = depth.RELEASED
    assert replace(how.depth, steps=released.steps, warmup=released.warmup, batch=released.batch) == released
    assert max(short.steps, how.depth.steps, how.recipe.training.steps, how.distilling.training.steps) < 10
    for short, whole in ((how.recipe, DenoiserRecipe()), (how.distilling, DistilledRecipe())):
        length = {name: getattr(whole.training, name) for name in ("steps", "batch_size", "accumulate", "held_out")}
        assert replace(short.training, **length) == whole.training


# --- which features ---


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("model", [SMALL, EVA])
def test_baselines_are_segmented_with_the_features_of_the_released_code(
    dvit: Dvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """timm ViTs: the intermediate layers without the norm. EVA-02: `forward_intermediates` gives the final output and
    the normed blocks; the released code takes the fourth of these, the last block but one."""
    made: dict[str, Backbone] = {}
    compare = Workbench.compare

    def note(self: Workbench, names: Sequence[str], task: Task) -> Iterator[Any]:
        made[task.name] = self.backbone
        return compare(self, names, task)

    monkeypatch.setattr(Workbench, "compare", note)
    assert_dry(dvit, model, tmp_path, with_depth=model != EVA)
    found = made["segmentation"]
    assert isinstance(found, TimmBackbone)
    side = 2 * found.patch_size
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if isinstance(found.model, Eva):
            final, blocks = found.model.forward_intermediates(image, indices=[0, 1], norm=True, output_fmt="NCHW")
            wanted = [final, *blocks][-2]
        else:
            assert isinstance(found.model, VisionTransformer)
            wanted = found.model.get_intermediate_layers(image, n=[1], reshape=True)[-1]
            normed = found.model.get_intermediate_layers(image, n=[1], reshape=True, norm=True)[-1]
            torch.testing.assert_close(made["depth"](image), normed.permute(0, 2, 3, 1))  # pyright: ignore
        torch.testing.assert_close(found(image), wanted.permute(0, 2, 3, 1))  # pyright: ignore


@pytest.mark.parametrize("model", [SMALL, EVA])
def test_segmentation_features_of_denoisers_and_distilled_models(model: str) -> None:
    backbone = dry.dry_backbone(model)
    assert running._as_segmented(backbone, "denoiser") is backbone
    distilled = running._as_segmented(backbone, "distilled")
    assert (distilled.layer, distilled.norm) == ((0, True) if model == EVA else (1, False))
    assert (backbone.layer, backbone.norm) == (1, True)


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Protocols, str]]:
    """Replace every model by mean colours and every step by a fixed result; return the requested steps."""
    asked: list[tuple[str, Protocols, str]] = []

    def at_once(row: Row, **given: Any) -> Iterator[tuple[Step, Line]]:
        assert find_row(row.published.model, row.published.variant, given["data"]).status == row.status
        for step in row.steps:
            if step.status == "ready":
                asked.append((row.published.model, given["protocols"], step.benchmark.name))
                task = step.benchmark.task
                metrics = {metric.name: 1.0 for metric in METRICS[task]}
                yield step, {"task": task, "metrics": metrics, "failed": None, "skipped": []}

    monkeypatch.setattr(reproduction, "reproduce_row", at_once)
    monkeypatch.setattr(dry, "dry_backbone", lambda _model: tiny_backbone())
    return asked


@pytest.mark.parametrize("variant", [None, "baseline", "voc_distilled"])
def test_dry_run_without_a_row_runs_every_published_row(
    dvit: Dvit, instant: list[tuple[str, Protocols, str]], tmp_path: Path, variant: str | None
) -> None:
    named = () if variant is None else ("--variant", variant)
    done = dvit("reproduce", "--dry", *named, "-o", tmp_path / "reproduced.jsonl")
    assert done.code == 0, done.err
    rows = [(row.model, row.variant) for row in published_rows() if variant in (None, row.variant)]
    assert len(rows) == {None: 34, "baseline": 12, "voc_distilled": 8}[variant]
    names, without_depth = ("VOC 2012", "ADE20K", "NYUv2 depth"), [(EVA, "baseline"), (EVA, "voc_distilled")]
    wanted = [(row[0], name) for row in rows for name in names if name != "NYUv2 depth" or row not in without_depth]
    assert [(model, name) for model, _, name in instant] == wanted
    assert all(how == dry.dry_protocols(tiny_backbone()) for _, how, _ in instant)
    for row in rows:
        lines = [line for line in done.out.splitlines() if line.split()[:2] == [*row]]
        assert len(lines) == (4 if row in without_depth else 7)
    assert list(tmp_path.iterdir()) == []


def test_failed_dry_run_is_reported_and_exits_1(dvit: Dvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(row: Row, **_: Any) -> Iterator[tuple[Step, Line]]:
        yield row.steps[0], {"metrics": {}, "failed": "no features", "skipped": []}

    monkeypatch.setattr(reproduction, "reproduce_row", at_once)
    monkeypatch.setattr(dry, "dry_backbone", lambda _model: tiny_backbone())
    done = dvit("reproduce", "--dry", "--row", SMALL, "-o", tmp_path / "reproduced.jsonl")
    assert done.code == 1
    assert "VOC 2012 failed: no features" in done.err


def test_interrupted_dry_run_does_not_claim_kept_steps(
    dvit: Dvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_row: Row, **_: Any) -> Iterator[tuple[Step, Line]]:
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduction, "reproduce_row", interrupted)
    monkeypatch.setattr(dry, "dry_backbone", lambda _model: tiny_backbone())
    done = dvit("reproduce", "--dry", "--row", SMALL)
    assert done.code == 130
    assert "interrupted" in done.err
    assert "finished steps are kept" not in done.err  # nothing of a dry run is kept


@pytest.mark.parametrize("model", sorted({*BASELINES} - {SMALL, *DISTILLED}))
def test_the_other_baselines_can_be_built(model: str) -> None:
    assert dry.dry_backbone(model).name == model
