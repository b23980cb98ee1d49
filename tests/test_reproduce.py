"""`dvit reproduce`: which published rows can be measured, what is missing for the others, and the steps themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from command import Dvit, in_process
from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.cli import reproduce as verb
from denoising_vit.denoiser import load_denoiser
from denoising_vit.evaluation import workbench
from denoising_vit.evaluation.segmentation import PAPER, Protocol
from denoising_vit.evaluation.workbench import Workbench
from denoising_vit.published import published_row, published_rows
from denoising_vit.reproduction import DenoiserRecipe, Row, Step, dry, find_row
from denoising_vit.reproduction.rows import ADE, VOC
from tiny_labelled import tiny_backbone

pytestmark = pytest.mark.usefixtures("one_thread")

Line = dict[str, Any]

SMALL = "vit_small_patch14_dinov2.lvd142m"

#: Two steps on crops of a few patches.
TINY = replace(PAPER, steps=2, warmup=1, batch=2, short_side=56, long_side=224, crop=56, window=56, window_stride=37)

#: A model of each architecture, the smallest that figures were published for.
ARCHITECTURES = {
    "DINOv2 with registers": "vit_small_patch14_reg4_dinov2.lvd142m",
    "DeiT-III": "deit3_base_patch16_224.fb_in1k",
    "CLIP": "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k",
    "DINO": "vit_base_patch16_224.dino",
    "MAE": "vit_base_patch16_224.mae",
    "EVA-02": "eva02_base_patch16_clip_224.merged2b",
    "supervised": "vit_base_patch16_384.augreg_in21k_ft_in1k",
}

BASELINES = [row.model for row in published_rows() if row.variant == "baseline"]


@pytest.fixture
def dvit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dvit:
    return in_process(capsys, monkeypatch)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dry.dry_data(tmp_path_factory.mktemp("written") / "data")


@pytest.fixture
def data(written: Path, tmp_path: Path) -> Path:
    """A copy of small images in the layouts of VOC 2012 and ADE20K, two in each split."""
    return Path(shutil.copytree(written, tmp_path / "data"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "reproduced.jsonl"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[BackboneSpec]:
    """Mean colours stand for every model, and the protocol is a tiny one; tells which models were loaded."""
    loaded: list[BackboneSpec] = []

    def load(spec: BackboneSpec) -> Backbone:
        loaded.append(spec)
        return tiny_backbone()

    monkeypatch.setattr(BackboneSpec, "load", load)
    monkeypatch.setattr(verb, "PAPER", TINY)
    return loaded


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_spec: BackboneSpec) -> Backbone:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(BackboneSpec, "load", load)


def lines_of(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def listed(dvit: Dvit, data: Path, out: Path) -> dict[tuple[str, str], str]:
    """Status by model and variant, as `--list` shows them."""
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
    for (_, variant), status in found.items():
        wanted = "missing" if variant in ("baseline", "voc_denoised") else "unsupported"
        assert f"VOC 2012 {wanted}, ADE20K {wanted}" in status
    assert found[SMALL, "baseline"].endswith("NYUv2 depth unsupported")
    assert "NYU" not in found["eva02_base_patch16_clip_224.merged2b", "baseline"]  # no depth was published
    assert not out.exists()


def test_list_tells_each_reason_once(dvit: Dvit, tmp_path: Path, out: Path) -> None:
    told = dvit("reproduce", "--list", "--data", tmp_path / "data", "-o", out).err
    assert told.count(f"VOC 2012: {tmp_path / 'data' / 'VOCdevkit' / 'VOC2012'} lacks JPEGImages") == 1
    assert told.count("distilled models (stage 3) are not in this version") <= 3  # one a benchmark
    assert len(told.splitlines()) == len(set(told.splitlines()))


def test_list_shows_what_is_ready(dvit: Dvit, data: Path, out: Path) -> None:
    shutil.rmtree(data / ADE.place)
    status = listed(dvit, data, out)[SMALL, "baseline"]
    assert status == "VOC 2012 ready, ADE20K missing, NYUv2 depth unsupported"


def test_list_of_other_results_is_refused(dvit: Dvit, data: Path, out: Path) -> None:
    out.write_text("buy milk\nand bread\n")
    done = dvit("reproduce", "--list", "--data", data, "-o", out)
    assert done.code == 2
    assert str(out) in done.err


# --- what cannot be done ---


@pytest.mark.usefixtures("no_model")
def test_row_without_data_says_what_is_missing_where_it_goes_and_where_to_get_it(
    dvit: Dvit, tmp_path: Path, out: Path
) -> None:
    done = dvit("reproduce", "--row", SMALL, "--data", tmp_path / "data", "-o", out)
    assert done.code == 2
    voc, ade = (tmp_path / "data" / place for place in ("VOCdevkit/VOC2012", "ADEChallengeData2016"))
    assert f"{voc} lacks JPEGImages, SegmentationClass, ImageSets/Segmentation/train.txt" in done.err
    assert "VOCtrainval_11-May-2012.tar, http://host.robots.ox.ac.uk/pascal/VOC/voc2012/" in done.err
    assert f"{ade} lacks images/training, images/validation, annotations/training" in done.err
    assert "ADEChallengeData2016.zip, http://data.csail.mit.edu/places/ADEchallenge/" in done.err
    assert "depth is not in this version" in done.err
    assert f"nothing can be measured of {SMALL}, baseline" in done.err
    assert not out.exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("more", [(), ("--dry",)])
def test_unknown_row_names_similar_ones(dvit: Dvit, data: Path, out: Path, more: tuple[str, ...]) -> None:
    done = dvit("reproduce", "--row", "vit_small_patch14_dinov2", "--data", data, "-o", out, *more)
    assert done.code == 2
    assert f"did you mean {SMALL}" in done.err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("more", [(), ("--dry",)])
def test_unknown_variant_names_those_that_there_are(dvit: Dvit, data: Path, out: Path, more: tuple[str, ...]) -> None:
    done = dvit("reproduce", "--row", SMALL, "--variant", "denoised", "--data", data, "-o", out, *more)
    assert done.code == 2
    assert "got 'denoised'" in done.err
    for variant in ("baseline", "voc_denoised", "imgnet_distilled"):
        assert variant in done.err


@pytest.mark.usefixtures("no_model")
def test_variant_that_was_not_published_of_a_model_is_refused(dvit: Dvit, data: Path, out: Path) -> None:
    done = dvit("reproduce", "--row", SMALL, "--variant", "voc_distilled", "--data", data, "-o", out)
    assert done.code == 2
    assert "(baseline, voc_denoised), got 'voc_distilled'" in done.err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ("imgnet_denoised", "denoisers of ImageNet photos are not in this version"),
        ("voc_distilled", "distilled models (stage 3) are not in this version"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--dry",)])
def test_other_variants_cannot_be_measured_yet(
    dvit: Dvit,
    data: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    reason: str,
    more: tuple[str, ...],
) -> None:
    monkeypatch.setattr(dry, "dry_backbone", lambda _model: tiny_backbone())
    command = ("reproduce", "--row", "vit_base_patch14_dinov2.lvd142m", "--variant", variant, "--data", data, "-o", out)
    done = dvit(*command, *more)
    assert done.code == 2
    assert reason in done.err
    assert "published measured" not in done.words  # no table of nothing
    assert not out.exists()


def test_row_has_to_be_named(dvit: Dvit, data: Path, out: Path) -> None:
    done = dvit("reproduce", "--data", data, "-o", out)
    assert done.code == 2
    assert "`dvit reproduce --list` names them" in done.err


def test_negative_seed_is_refused(dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path) -> None:
    done = dvit("reproduce", "--row", SMALL, "--data", data, "-o", out, "--seed", -1)
    assert done.code == 2
    assert "seed" in done.err and "-1" in done.err
    assert small == []  # said before the model is fetched


def test_results_that_cannot_be_written_are_said_before_the_model_is_loaded(
    dvit: Dvit, small: list[BackboneSpec], data: Path
) -> None:
    done = dvit("reproduce", "--row", SMALL, "--data", data, "-o", data)
    assert done.code == 2
    assert f"cannot write results to {data}" in done.err
    assert small == []


# --- measuring ---


def test_steps_are_measured_and_printed_beside_the_published_figures(
    dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path
) -> None:
    done = dvit("reproduce", "--row", SMALL, "--data", data, "-o", out, "--device", "cpu")
    assert done.code in (0, 1), done.err  # depth is left out, and that is said
    assert "NYUv2 depth: depth is not in this version" in done.err
    assert [(spec.backbone, spec.weights, spec.device) for spec in small] == [(SMALL, "hub", "cpu")]
    voc, ade = lines_of(out)
    for line, layout in ((voc, "voc2012"), (ade, "ade20k")):
        assert (line["task"], line["features"], line["failed"]) == ("segmentation", "raw", None)
        assert line["published"] == {"model": SMALL, "variant": "baseline"}
        assert line["settings"]["data"]["layout"] == layout
        assert line["settings"]["normalisation"] == "imagenet"
        assert line["images"] == {"train": 2, "val": 2}
    published = published_row(SMALL, "baseline").figures
    for line, name, prefix in ((voc, "VOC 2012", "voc"), (ade, "ADE20K", "ade")):
        for metric in ("mIoU", "mAcc"):
            (row,) = [row.split() for row in done.out.splitlines() if f" {name} " in row and f" {metric} " in row]
            assert row[-2:] == [f"{published[f'{prefix}_{metric.lower()}']:.2f}", f"{line['metrics'][metric]:.2f}"]


def test_second_call_keeps_results_and_the_list_says_done(
    dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("reproduce", "--row", SMALL, "--data", data, "-o", out)
    first = dvit(*command)
    before = out.read_bytes()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(workbench, "linear_segmentation", never)
    again = dvit(*command)
    assert (again.code, again.out, out.read_bytes()) == (first.code, first.out, before)
    found = listed(dvit, data, out)
    assert found[SMALL, "baseline"].startswith("VOC 2012 done, ADE20K done")
    assert found["vit_base_patch16_224.mae", "baseline"].startswith("VOC 2012 ready, ADE20K ready")


def test_report_shows_what_was_measured_beside_what_was_published(
    dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path, tmp_path: Path
) -> None:
    dvit("reproduce", "--row", SMALL, "--data", data, "-o", out)
    done = dvit("report", out, "-o", tmp_path / "results.md")
    assert done.code == 0, done.err
    text = (tmp_path / "results.md").read_text().split("## Published and measured")[1]
    assert "not compared" not in text
    for line, heading in zip(lines_of(out), ("### VOC", "### ADE20K"), strict=True):
        part = text.split(heading)[1].split("###")[0]
        (row,) = [row for row in part.splitlines() if row.startswith(f"| {SMALL} | baseline")]
        for metric in ("mIoU", "mAcc"):
            assert f"{line['metrics'][metric]:.2f}" in row
    assert "81.78" in text and "44.05" in text


def test_only_the_benchmark_that_is_there_is_measured(
    dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path
) -> None:
    shutil.rmtree(data / VOC.place)
    done = dvit("reproduce", "--row", SMALL, "--data", data, "-o", out)
    assert done.code == 1
    assert [line["settings"]["data"]["name"] for line in lines_of(out)] == ["ADE20K"]
    assert f"VOC 2012: {data / VOC.place} lacks JPEGImages" in done.err
    assert " VOC 2012 " not in done.out


def test_row_of_which_every_step_was_measured_succeeds(
    dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path
) -> None:
    done = dvit("reproduce", "--row", "eva02_base_patch16_clip_224.merged2b", "--data", data, "-o", out)
    assert (done.code, len(lines_of(out))) == (0, 2), done.err


def test_images_without_masks_are_named_and_the_exit_code_says_so(
    dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path
) -> None:
    (data / VOC.place / "SegmentationClass" / "val_1.png").unlink()
    row = "eva02_base_patch16_clip_224.merged2b"
    done = dvit("reproduce", "--row", row, "--data", data, "-o", out)
    assert lines_of(out)[0]["images"] == {"train": 2, "val": 1}
    assert "val_1" in done.err  # half of the images make another benchmark than the published one
    assert done.code == 1


def test_benchmark_without_any_mask_fails_and_the_other_is_measured(
    dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path
) -> None:
    for mask in (data / VOC.place / "SegmentationClass").iterdir():
        mask.unlink()
    done = dvit("reproduce", "--row", SMALL, "--data", data, "-o", out)
    assert "none of 2 pairs can be used" in done.err
    assert str(data / VOC.place) in done.err
    assert [line["settings"]["data"]["name"] for line in lines_of(out) if not line["failed"]] == ["ADE20K"]
    assert done.code == 1


def test_interrupt_leaves_finished_steps(
    dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = workbench.linear_segmentation
    begun: list[str] = []

    def until_the_second(source: Any, labelled: Any, *rest: Any, **more: Any) -> Any:
        begun.append(labelled.name)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return real(source, labelled, *rest, **more)

    monkeypatch.setattr(workbench, "linear_segmentation", until_the_second)
    command = ("reproduce", "--row", SMALL, "--data", data, "-o", out)
    stopped = dvit(*command)
    assert stopped.code == 130
    assert "finished steps stay" in stopped.err
    assert [line["settings"]["data"]["name"] for line in lines_of(out)] == ["VOC 2012"]
    dvit(*command)
    assert begun == ["VOC 2012", "ADE20K", "ADE20K"]
    assert len(lines_of(out)) == 2


def test_another_seed_is_another_measurement(dvit: Dvit, small: list[BackboneSpec], data: Path, out: Path) -> None:
    for seed in (0, 1):
        dvit("reproduce", "--row", SMALL, "--data", data, "-o", out, "--seed", seed)
    assert [line["seeds"][0]["seed"] for line in lines_of(out)] == [0, 0, 1, 1]


# --- dry runs ---


def assert_dry(dvit: Dvit, model: str, folder: Path, variant: str = "baseline") -> None:
    """Both benchmarks from end to end, nothing kept."""
    row = "--row", model, "--variant", variant
    done = dvit("reproduce", "--dry", *row, "--device", "cpu", "-o", folder / "reproduced.jsonl")
    assert done.code == 0, done.err
    assert "the measured figures mean nothing" in done.words
    rows = [line.split() for line in done.out.splitlines() if line.startswith(model)]
    assert [(row[2], row[-3]) for row in rows] == [
        *(("VOC", "mIoU"), ("VOC", "mAcc"), ("ADE20K", "mIoU"), ("ADE20K", "mAcc"))
    ]
    assert all(0 <= float(row[-1]) <= 100 for row in rows)
    assert list(folder.iterdir()) == []


def test_dry_run_follows_the_published_protocol(dvit: Dvit, tmp_path: Path) -> None:
    assert_dry(dvit, SMALL, tmp_path)


@pytest.mark.parametrize("model", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_every_architecture_runs_from_end_to_end(
    dvit: Dvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(dry, "dry_protocol", lambda: TINY)
    assert_dry(dvit, model, tmp_path)


def test_a_denoiser_is_fitted_trained_and_probed(dvit: Dvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[str] = []
    monkeypatch.setattr(dry, "dry_protocol", lambda: TINY)
    by_protocol = Workbench.by_protocol

    def note(self: Workbench, names: Sequence[str], *others: Any) -> Iterator[Any]:
        denoiser = load_denoiser(str(self.denoiser), backbone=self.backbone)
        judged.append(f"{names[0]} after step {denoiser.info['step']}, {denoiser.info['images']} images")
        return by_protocol(self, names, *others)

    monkeypatch.setattr(Workbench, "by_protocol", note)
    assert_dry(dvit, SMALL, tmp_path, "voc_denoised")
    assert judged == ["denoiser after step 2, 3 images"] * 2  # one of four photos is held out


def test_recipe_of_denoisers_is_the_published_one() -> None:
    recipe = DenoiserRecipe()
    assert (recipe.training.steps, recipe.training.batch_size, recipe.training.learning_rate) == (50_000, 16, 2e-4)
    assert (recipe.views.whole, recipe.views.keep, recipe.views.inverted) == (1, 2, 0)
    assert recipe.images == 10_000


def test_dry_protocol_is_the_published_one_but_for_its_length() -> None:
    protocol = dry.dry_protocol()
    assert replace(protocol, steps=PAPER.steps, warmup=PAPER.warmup, batch=PAPER.batch) == PAPER
    assert protocol.steps < 10


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Protocol, str]]:
    """Every model is mean colours and every step is done at once; tells what was asked for."""
    asked: list[tuple[str, Protocol, str]] = []

    def at_once(row: Row, **given: Any) -> Iterator[tuple[Step, Line]]:
        assert find_row(row.published.model, "baseline", given["data"]).status.startswith(
            "VOC 2012 ready, ADE20K ready"
        )
        for step in row.steps:
            if step.status == "ready":
                asked.append((row.published.model, given["protocol"], step.benchmark.name))
                yield step, {"metrics": {"mIoU": 1.0, "mAcc": 2.0}, "failed": None, "skipped": []}

    monkeypatch.setattr(verb, "reproduce_row", at_once)
    monkeypatch.setattr(dry, "dry_backbone", lambda _model: tiny_backbone())
    return asked


def test_dry_run_without_a_row_reaches_all_twelve_baselines(
    dvit: Dvit, instant: list[tuple[str, Protocol, str]], tmp_path: Path
) -> None:
    done = dvit("reproduce", "--dry", "-o", tmp_path / "reproduced.jsonl")
    assert done.code == 0, done.err
    assert len(BASELINES) == 12
    assert [(model, name) for model, _, name in instant] == [
        (model, name) for model in BASELINES for name in ("VOC 2012", "ADE20K")
    ]
    assert {protocol for _, protocol, _ in instant} == {dry.dry_protocol()}
    for model in BASELINES:
        assert sum(line.startswith(model + " ") for line in done.out.splitlines()) == 4
    assert list(tmp_path.iterdir()) == []


def test_dry_run_that_fails_says_so(dvit: Dvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(row: Row, **_: Any) -> Iterator[tuple[Step, Line]]:
        yield row.steps[0], {"metrics": {}, "failed": "no features", "skipped": []}

    monkeypatch.setattr(verb, "reproduce_row", at_once)
    monkeypatch.setattr(dry, "dry_backbone", lambda _model: tiny_backbone())
    done = dvit("reproduce", "--dry", "--row", SMALL, "-o", tmp_path / "reproduced.jsonl")
    assert done.code == 1
    assert "VOC 2012 failed: no features" in done.err


def test_interrupted_dry_run_promises_nothing(dvit: Dvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_row: Row, **_: Any) -> Iterator[tuple[Step, Line]]:
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "reproduce_row", interrupted)
    monkeypatch.setattr(dry, "dry_backbone", lambda _model: tiny_backbone())
    done = dvit("reproduce", "--dry", "--row", SMALL)
    assert done.code == 130
    assert "interrupted" in done.err
    assert "finished steps stay" not in done.err  # nothing of a dry run is kept


@pytest.mark.parametrize("model", sorted({*BASELINES} - {SMALL, *ARCHITECTURES.values()}))
def test_the_other_baselines_are_models_that_can_be_built(model: str) -> None:
    assert dry.dry_backbone(model).name == model
