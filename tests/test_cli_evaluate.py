"""`dvit evaluate`, and `dvit report` on its results: lines, tables, exit codes, messages."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tiny_artifact
import tiny_fit
import tiny_labelled as tiny
from command import Dvit, Outcome, in_process
from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.evaluation import knn
from denoising_vit.evaluation.segmentation import protocol

pytestmark = pytest.mark.usefixtures("one_thread")

Line = dict[str, Any]

#: A real model, small enough to be fast. Random weights are the same in every process.
REAL = ("--backbone", tiny_fit.MODEL, "--weights", "random", "--device", "cpu", "--dtype", "float32")

#: Few views and few neighbours.
EXACT = ("--exact.views", 12)
FEW = ("--k", 3, *EXACT)

#: Strength of the planted artifact: about that of the content of photos.
STRENGTH = 8.0

#: A few training steps for each of two probes.
SHORT = ("--steps", 3, "--seeds", 0, 1, *EXACT)


@pytest.fixture
def dvit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dvit:
    """Runs `dvit ...` in this process."""
    return in_process(capsys, monkeypatch)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> tiny_artifact.Planted:
    """Replaces any model: features are a patch's pixels plus an artifact. Counts its forward passes."""
    model = tiny_artifact.Planted(STRENGTH)
    backbone = tiny_artifact.plain(model, layout="channels_last")  # as many channels as patches along a side
    monkeypatch.setattr(BackboneSpec, "load", lambda _spec: backbone)
    return model


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a model is loaded: wrong commands must be rejected before that."""

    def load(_spec: BackboneSpec) -> Backbone:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(BackboneSpec, "load", load)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written") / "blocks"
    tiny.write_labelled(root, tiny.coloured(4, 0), tiny.coloured(4, 1))
    return root


@pytest.fixture
def data(written: Path, tmp_path: Path) -> Path:
    """A copy of the labelled folder: 4 images of 48 x 48 pixels in each split, three classes."""
    return Path(shutil.copytree(written, tmp_path / "blocks"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return tiny_artifact.write_photos(tmp_path / "photos", 8)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """The planted artifact as a file."""
    return save_artifact(tmp_path / "g.safetensors", tiny_artifact.Planted(STRENGTH))


def save_artifact(path: Path, model: tiny_artifact.Planted) -> Path:
    backbone = tiny_artifact.plain(model, layout="channels_last")
    tiny_artifact.artifact_of(backbone, model.strength * tiny_artifact.pattern(6, 6)).save(path)
    return path


def lines_of(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_features(lines: Sequence[Line]) -> dict[str, Line]:
    assert len({line["features"] for line in lines}) == len(lines)
    return {line["features"]: line for line in lines}


def assert_no_results(out: Path) -> None:
    """Checks that nothing was evaluated: the results file is missing or empty."""
    assert not out.exists() or not out.read_text()


# --- knn ---


def test_knn_evaluates_raw_and_exact_features_of_a_real_model(dvit: Dvit, data: Path, out: Path) -> None:
    done = dvit(
        *("evaluate", "knn", "--data", data, "--features", "raw,exact", "-o", out, *REAL, "--k", 3),
        *("--exact.views", 8, "--exact.size", 48),
    )
    assert done.code == 0, done.err
    raw, exact = lines_of(out)
    assert (raw["features"], exact["features"]) == ("raw", "exact")
    for line in (raw, exact):
        assert (line["task"], line["failed"], line["skipped"]) == ("knn", None, [])
        assert line["images"] == {"train": 4, "val": 4}
        assert line["settings"]["backbone"]["name"] == tiny_fit.MODEL
        assert set(line["classes"]) == {"class 0", "class 1", "class 2"}
        assert f"{line['metrics']['mIoU']:.2f}" in done.out
    assert raw["metrics"] != exact["metrics"]
    assert exact["settings"]["features"]["views"] == 8
    assert exact["paired"]["difference"] == pytest.approx(exact["metrics"]["mIoU"] - raw["metrics"]["mIoU"])
    assert f"{exact['paired']['difference']:+.2f}" in done.out
    assert f"backbone {tiny_fit.MODEL}, patch 16" in done.err
    assert f"`dvit report {out} -o results.md`" in done.err


def test_subtracting_the_artifact_raises_knn_scores(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path, artifact: Path
) -> None:
    done = dvit("evaluate", "knn", "--data", data, "-o", out, "--artifact", artifact, *FEW)
    assert done.code == 0, done.err
    found = by_features(lines_of(out))
    assert list(found) == ["raw", "subtract", "exact"]
    # Without the artifact, the colour of a patch determines its class.
    assert found["subtract"]["metrics"]["mIoU"] > 95 > found["raw"]["metrics"]["mIoU"] + 10
    assert found["subtract"]["settings"]["features"]["artifact"] == found["exact"]["settings"]["features"]["artifact"]
    assert planted.passes > 0


def test_default_results_and_cache_are_in_the_working_directory(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert dvit("evaluate", "knn", "--data", data, "--features", "raw", *FEW).code == 0
    assert sorted(path.name for path in Path().iterdir()) == ["results.cache", "results.jsonl"]


def test_cache_and_classes_options_set_the_paths(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path, tmp_path: Path
) -> None:
    (data / "classes.txt").rename(tmp_path / "names.txt")
    done = dvit(
        *("evaluate", "knn", "--data", data, "--features", "raw", "-o", out, *FEW),
        *("--classes", tmp_path / "names.txt", "--cache", tmp_path / "kept", "--images", 2),
    )
    assert done.code == 0, done.err
    assert lines_of(out)[0]["images"] == {"train": 2, "val": 2}
    assert (tmp_path / "kept" / "features").is_dir() and not out.with_suffix(".cache").exists()


def test_crops_option_is_part_of_the_settings(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path
) -> None:
    for crops in ("whole", "neutral"):
        assert dvit("evaluate", "knn", "--data", data, "--features", "raw", "-o", out, "--crops", crops, *FEW).code == 0
    assert [line["settings"]["crops"] for line in lines_of(out)] == ["whole", "neutral"]


# --- segmentation ---


def test_segmentation_trains_a_probe_for_each_seed(dvit: Dvit, data: Path, out: Path) -> None:
    done = dvit(
        *("evaluate", "segmentation", "--data", data, "--features", "raw,exact", "-o", out, *REAL),
        *("--steps", 3, "--seeds", 0, 1, "--exact.views", 8, "--exact.size", 48),
    )
    assert done.code == 0, done.err
    for line in lines_of(out):
        assert (line["task"], line["failed"]) == ("segmentation", None)
        assert [seed["seed"] for seed in line["seeds"]] == [0, 1]
        assert line["metrics"]["mIoU"] == pytest.approx(np.mean([seed["mIoU"] for seed in line["seeds"]]))
        assert (line["settings"]["preset"], line["settings"]["steps"]) == ("quick", 3)
        assert f"{line['metrics']['mIoU']:.2f}" in done.out


def test_longer_training_is_better(dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path) -> None:
    common = ("evaluate", "segmentation", "--data", data, "--features", "raw", "-o", out, "--seeds", 0)
    assert dvit(*common, "--steps", 1).code == dvit(*common, "--steps", 300, "--learning-rate", 0.05).code == 0
    short, long = (line["metrics"]["mIoU"] for line in lines_of(out))
    assert long > short + 30


def test_adding_a_seed_keeps_the_finished_one(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path
) -> None:
    common = ("evaluate", "segmentation", "--data", data, "--features", "raw", "-o", out, "--steps", 3)
    assert dvit(*common, "--seeds", 0).code == dvit(*common, "--seeds", 0, 1).code == 0
    one, two = lines_of(out)
    assert two["seeds"][0] == one["seeds"][0] and len(two["seeds"]) == 2


def test_paper_preset_runs_and_is_recorded_in_the_settings(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(protocol.PAPER, crop=32, short_side=48, long_side=96, window=32, window_stride=24)
    monkeypatch.setattr(protocol, "PAPER", small)
    done = dvit(
        *("evaluate", "segmentation", "--data", data, "--features", "raw,exact", "-o", out, *EXACT),
        *("--preset", "paper", "--steps", 1, "--batch", 1, "--seeds", 0),
    )
    assert done.code == 0, done.err
    for line in lines_of(out):
        settings = line["settings"]
        assert (settings["preset"], settings["steps"], settings["batch"], settings["augment"]) == ("paper", 1, 1, True)


# --- artifacts ---


def test_artifacts_of_a_real_model_has_metrics_of_each_source(dvit: Dvit, photos: Path, out: Path) -> None:
    done = dvit("evaluate", "artifacts", "--data", photos, "-o", out, *REAL, "--size", 48)
    assert done.code == 0, done.err
    found = by_features(lines_of(out))
    assert list(found) == ["raw", "subtract", "exact"]
    assert len({json.dumps(line["metrics"]) for line in found.values()}) == 3
    left = [found[name]["metrics"]["blank_variance"] for name in ("raw", "subtract", "exact")]
    assert left[0] == 1 and left[1] not in (None, 1) and left[2] is None
    for line in found.values():
        assert (line["task"], line["images"], line["failed"]) == ("artifacts", {"photos": 8}, None)
        assert line["settings"]["data"]["name"] == "photos"
    assert "effective rank" in done.out and "subtract" in done.out


def test_artifacts_evaluates_only_the_given_features(
    dvit: Dvit, planted: tiny_artifact.Planted, photos: Path, out: Path
) -> None:
    done = dvit("evaluate", "artifacts", "--data", photos, "--features", "raw", "-o", out, "--json")
    assert (done.code, [row["features"] for row in done.rows]) == (0, ["raw"]), done.err


def test_artifacts_keeps_results_when_features_are_added(
    dvit: Dvit, planted: tiny_artifact.Planted, photos: Path, out: Path
) -> None:
    command = ("evaluate", "artifacts", "--data", photos, "-o", out, "--features")
    assert dvit(*command, "raw").code == 0
    done = dvit(*command, "raw,project,subtract")
    assert done.code == 0, done.err
    assert "raw (kept from an earlier run)" in done.err
    assert [line["features"] for line in lines_of(out)] == ["raw", "project", "subtract"]
    project = by_features(lines_of(out))["project"]["settings"]["features"]
    assert list(project) == ["subspace"]


def test_artifacts_skips_and_reports_unusable_photos(
    dvit: Dvit, planted: tiny_artifact.Planted, photos: Path, out: Path
) -> None:
    (photos / "broken.png").write_bytes(b"no image")
    Image.fromarray(tiny_artifact.flat()).save(photos / "dark.png")
    done = dvit("evaluate", "artifacts", "--data", photos, "-o", out)
    assert done.code == 1
    for line in lines_of(out):
        assert sorted(name for name, _ in line["skipped"]) == ["broken.png", "dark.png"]
    assert done.err.count("broken.png") == done.err.count("dark.png: no content") == 1


def test_artifacts_are_evaluated_again_if_photos_change(
    dvit: Dvit, planted: tiny_artifact.Planted, photos: Path, out: Path
) -> None:
    command = ("evaluate", "artifacts", "--data", photos, "--features", "raw", "-o", out)
    assert dvit(*command).code == 0
    tiny_artifact.write_photos(photos, 8, seed=1)
    assert dvit(*command).code == 0
    first, second = (line["metrics"] for line in lines_of(out))
    assert first != second


def test_interrupted_artifacts_writes_no_results(
    dvit: Dvit, planted: tiny_artifact.Planted, photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("denoising_vit.diagnosis.diagnose.run_diagnosis", interrupted)
    done = dvit("evaluate", "artifacts", "--data", photos, "-o", out)
    assert done.code == 130
    assert "interrupted" in done.err
    assert_no_results(out)


# --- repeated runs ---


VERBS = {
    "knn": ("--features", "raw,exact", *FEW),
    "segmentation": ("--features", "raw,exact", *SHORT),
    "artifacts": ("--features", "raw,exact"),
}


def command_of(verb: str, data: Path, photos: Path, out: Path) -> tuple[object, ...]:
    return ("evaluate", verb, "--data", photos if verb == "artifacts" else data, "-o", out, *VERBS[verb])


@pytest.mark.parametrize("verb", VERBS)
def test_repeated_command_keeps_all_lines_and_reports_it(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, photos: Path, out: Path, verb: str
) -> None:
    command = command_of(verb, data, photos, out)
    first = dvit(*command)
    assert first.code == 0, first.err
    assert "kept" not in first.err
    before, passes = out.read_bytes(), planted.passes
    again = dvit(*command)
    assert (again.code, again.out) == (0, first.out)
    assert out.read_bytes() == before
    assert planted.passes == passes
    assert again.err.count("(kept from an earlier run)") == 2


@pytest.mark.parametrize("verb", VERBS)
def test_json_prints_the_lines_of_the_results_file(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, photos: Path, out: Path, verb: str
) -> None:
    command = command_of(verb, data, photos, out)
    for done in (dvit(*command, "--json"), dvit(*command, "--json")):  # kept lines as well
        assert done.code == 0, done.err
        assert done.rows == lines_of(out)


def test_other_k_adds_a_line(dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path) -> None:
    for k in (3, 4):
        assert dvit("evaluate", "knn", "--data", data, "--features", "raw", "-o", out, "--k", k).code == 0
    assert [line["settings"]["k"] for line in lines_of(out)] == [3, 4]


def test_interrupt_keeps_finished_lines_and_the_same_command_resumes(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = knn.nearest_neighbours
    asked: list[str] = []

    def until_the_second(source: Any, *rest: Any, **more: Any) -> Any:
        asked.append(source.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(source, *rest, **more)

    monkeypatch.setattr(knn, "nearest_neighbours", until_the_second)
    command = command_of("knn", data, data, out)
    stopped = dvit(*command)
    assert stopped.code == 130
    assert "interrupted; finished results are kept, run the command again to resume" in stopped.err
    assert [line["features"] for line in lines_of(out)] == ["raw"]
    resumed = dvit(*command)
    assert resumed.code == 0, resumed.err
    assert [line["features"] for line in lines_of(out)] == ["raw", "exact"]
    assert asked == ["raw", "exact", "exact"]


def test_truncated_line_is_computed_again(dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path) -> None:
    command = command_of("knn", data, data, out)
    assert dvit(*command).code == 0
    whole = lines_of(out)
    out.write_bytes(out.read_bytes()[:-40])
    assert dvit(*command).code == 0
    *_, last = out.read_text().splitlines()
    assert json.loads(last)["metrics"] == whole[1]["metrics"]


# --- failures and skipped images ---


@pytest.mark.parametrize("verb", ["knn", "segmentation"])
def test_subtract_fails_without_an_artifact_and_others_are_evaluated(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path, verb: str
) -> None:
    options = FEW if verb == "knn" else SHORT
    done = dvit("evaluate", verb, "--data", data, "-o", out, *options)
    assert done.code == 1
    found = by_features(lines_of(out))
    assert found["raw"]["failed"] is found["exact"]["failed"] is None
    assert found["exact"]["paired"]["against"] == "raw"
    assert "no artifact for Planted with these weights" in found["subtract"]["failed"]
    (message,) = [line for line in done.err.splitlines() if line.startswith("subtract failed: ")]
    assert "dvit calibrate PHOTOS -o FILE" in message
    assert "--artifact" in message  # the option that takes that file


def test_artifact_of_another_backbone_fails_with_a_reason(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path, tmp_path: Path
) -> None:
    path = save_artifact(tmp_path / "other.safetensors", tiny_artifact.Planted(STRENGTH, seed=1))
    done = dvit("evaluate", "knn", "--data", data, "-o", out, "--features", "raw,subtract", "--artifact", path, *FEW)
    assert done.code == 1
    found = by_features(lines_of(out))
    assert found["raw"]["failed"] is None
    assert "subtract failed: " in done.err and found["subtract"]["failed"] in done.err


def test_missing_artifact_file_is_named(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path, tmp_path: Path
) -> None:
    path = tmp_path / "gone.safetensors"
    done = dvit("evaluate", "knn", "--data", data, "-o", out, "--features", "raw,subtract", "--artifact", path, *FEW)
    assert done.code != 0
    assert str(path) in done.err


def test_report_omits_a_failure_that_was_later_measured(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path, artifact: Path, tmp_path: Path
) -> None:
    command = ("evaluate", "knn", "--data", data, "-o", out, "--features", "raw,subtract", *FEW)
    assert dvit(*command).code == 1
    assert dvit(*command, "--artifact", artifact).code == 0
    assert dvit("report", out, "-o", tmp_path / "results.md").code == 0
    assert "no artifact for Planted" not in (tmp_path / "results.md").read_text()


def test_mask_of_another_size_is_skipped_and_reported(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path
) -> None:
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(data / "val" / "masks" / "02.png")
    done = dvit("evaluate", "knn", "--data", data, "--features", "raw", "-o", out, *FEW)
    assert done.code == 1
    (line,) = lines_of(out)
    assert line["images"] == {"train": 4, "val": 3}
    ((name, reason),) = line["skipped"]
    assert name == "val/02.png"
    assert "a photo of 48 x 48 pixels and a mask of 48 x 40" in reason
    assert f"skipped: val/02.png: {reason}" in done.err


def test_label_out_of_range_is_skipped_and_reported(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path
) -> None:
    Image.fromarray(np.full((48, 48), 9, np.uint8)).save(data / "train" / "masks" / "01.png")
    done = dvit("evaluate", "segmentation", "--data", data, "--features", "raw", "-o", out, *SHORT)
    assert done.code == 1
    assert "skipped: train/01.png: " in done.err
    assert "label 9 in 2,304 pixels; expected 0 to 2 for the 3 classes" in done.err


def test_unpaired_photos_and_masks_are_skipped_and_reported(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path
) -> None:
    (data / "train" / "masks" / "00.png").unlink()
    (data / "val" / "images" / "03.png").unlink()
    done = dvit("evaluate", "knn", "--data", data, "--features", "raw", "-o", out, *FEW)
    assert done.code == 1
    assert "skipped: train/00.png: a photo without a mask" in done.err
    assert "skipped: val/03.png: a mask without a photo" in done.err
    assert lines_of(out)[0]["images"] == {"train": 3, "val": 3}


def test_kept_lines_still_report_skipped_images(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path
) -> None:
    (data / "train" / "masks" / "00.png").unlink()
    command = ("evaluate", "knn", "--data", data, "--features", "raw", "-o", out, *FEW)
    for _ in range(2):
        done = dvit(*command)
        assert (done.code, done.err.count("skipped: train/00.png")) == (1, 1)


def test_class_that_never_occurs_is_reported(dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path) -> None:
    with (data / "classes.txt").open("a") as names:
        names.write("unicorn\n")
    done = dvit("evaluate", "knn", "--data", data, "--features", "raw", "-o", out, *FEW)
    assert done.code == 0
    assert "classes without pixels in val, excluded from means unless predicted: unicorn" in done.err
    (line,) = lines_of(out)
    assert (line["absent"], line["classes"]["unicorn"]["IoU"]) == (["unicorn"], None)


def test_one_image_in_each_split_is_enough(
    dvit: Dvit, planted: tiny_artifact.Planted, tmp_path: Path, out: Path
) -> None:
    tiny.write_labelled(tmp_path / "one", tiny.coloured(1, 0), tiny.coloured(1, 1))
    common = ("--data", tmp_path / "one", "--features", "raw,exact", "-o", out)
    assert dvit("evaluate", "knn", *common, *FEW).code == 0
    assert dvit("evaluate", "segmentation", *common, *SHORT).code == 0
    assert len(lines_of(out)) == 4
    assert all(line["images"] == {"train": 1, "val": 1} and not line["failed"] for line in lines_of(out))


def test_masks_without_any_label_in_training_fail_with_a_reason(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path
) -> None:
    for mask in (data / "train" / "masks").iterdir():
        Image.fromarray(np.full((48, 48), 255, np.uint8)).save(mask)
    for verb, options in (("knn", FEW), ("segmentation", SHORT)):
        done = dvit("evaluate", verb, "--data", data, "--features", "raw", "-o", out, *options)
        assert done.code != 0, done.out
        assert "labelled" in done.err or "no label" in done.err or "has a label" in done.err


def test_more_neighbours_than_patches_are_rejected_with_advice(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path
) -> None:
    done = dvit("evaluate", "knn", "--data", data, "--features", "raw", "-o", out, "--k", 145)
    assert done.code != 0
    assert "144 labelled patches, fewer than the 145 neighbours" in done.err
    assert "a smaller --k" in done.err


# --- wrong usage ---


@pytest.mark.parametrize("verb", ["knn", "segmentation", "artifacts"])
@pytest.mark.parametrize(
    ("features", "words"),
    [
        ("raw,clean", "unknown features: 'clean'"),
        ("raw,raw", "got raw, raw"),
        ("", "unknown features: ''"),
        ("raw,", "unknown features: ''"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_wrong_feature_names_are_rejected(
    dvit: Dvit, data: Path, photos: Path, out: Path, verb: str, features: str, words: str
) -> None:
    where = photos if verb == "artifacts" else data
    done = dvit("evaluate", verb, "--data", where, "--features", features, "-o", out)
    assert done.code == 2
    names = "raw, subtract, exact, denoiser, distilled"
    assert f"choose from {names}" in done.err
    assert words in done.err
    assert_no_results(out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("knn", "--k", 0), "k must be at least 1, got 0"),
        (("knn", "--gallery", -1), "gallery must be at least 0, got -1"),
        (("knn", "--temperature", 0), "temperature must be a positive number, got 0"),
        (("knn", "--seed", -1), "seed must be at least 0, got -1"),
        (("knn", "--images", -1), "expected a number of images of at least 1, or 0 for all, got -1"),
        (("knn", "--exact.views", 0), "views must be at least 1, got 0"),
        (("knn", "--exact.method", "neural-field"), "exact"),
        (("knn", "--cache-gb", -1), "cache_gb must be at least 0"),
        (("segmentation", "--steps", 0), "steps must be at least 1, got 0"),
        (("segmentation", "--batch", 0), "batch must be at least 1, got 0"),
        (("segmentation", "--learning-rate", 0), "learning_rate must be "),
        (("segmentation", "--weight-decay", -1), "weight_decay must be at least 0, got -1"),
        (("segmentation", "--seeds", 1, 1), "seeds must be one or more different numbers of at least 0"),
        (("segmentation", "--seeds", -1), "seeds must be one or more different numbers of at least 0"),
        (("segmentation", "--preset", "paper", "--size", 48), "size applies to preset quick"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_options_out_of_range_are_rejected_before_loading_a_model(
    dvit: Dvit, data: Path, out: Path, options: tuple[object, ...], message: str
) -> None:
    verb, *more = options
    done = dvit("evaluate", verb, "--data", data, "-o", out, *more)
    assert done.code == 2, done.err
    assert message in done.err
    assert_no_results(out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--photos", -1), "--photos must be at least 0 (all), got -1"),
        (("--views", 1), "views must be at least 2"),
        (("--photos", 5), "5 usable photos"),
        (("--size", 50), "does not fit the patch grid"),
    ],
)
def test_wrong_artifacts_options_exit_2_with_a_message(
    dvit: Dvit, planted: tiny_artifact.Planted, photos: Path, out: Path, options: tuple[object, ...], message: str
) -> None:
    done = dvit("evaluate", "artifacts", "--data", photos, "-o", out, *options)
    assert done.code == 2
    assert message in done.err
    assert_no_results(out)


@pytest.mark.parametrize("verb", ["knn", "segmentation"])
def test_size_off_the_patch_grid_exits_2_and_suggests_sizes(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path, verb: str
) -> None:
    done = dvit("evaluate", verb, "--data", data, "--features", "raw,exact", "-o", out, "--size", 50)
    assert "a side of 50 pixels does not fit the patch grid" in done.err
    assert "Nearest: 48 or 56" in done.err
    assert done.code == 2  # the command cannot run as given, whatever the features
    assert_no_results(out)


def test_size_takes_height_and_width(dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path) -> None:
    done = dvit("evaluate", "knn", "--data", data, "--features", "raw,exact", "-o", out, "--size", 40, 64, *FEW)
    assert done.code == 0, done.err
    assert [line["settings"]["size"] for line in lines_of(out)] == [[40, 64]] * 2


def break_nothing_there(data: Path) -> None:
    shutil.rmtree(data)


def break_file_there(data: Path) -> None:
    shutil.rmtree(data)
    data.write_text("")


def break_no_masks(data: Path) -> None:
    shutil.rmtree(data / "val" / "masks")


def break_other_folder(data: Path) -> None:
    shutil.rmtree(data)
    (data / "holiday").mkdir(parents=True)
    (data / "notes.txt").write_text("")


def break_empty(data: Path) -> None:
    shutil.rmtree(data)
    data.mkdir()


def break_class_list(data: Path) -> None:
    (data / "classes.txt").unlink()


def break_all_masks(data: Path) -> None:
    for mask in (data / "val" / "masks").iterdir():
        mask.write_bytes(b"no image")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_nothing_there, ["expected a data set folder", "found nothing"]),
        (break_file_there, ["expected a data set folder", "found a file"]),
        (break_no_masks, ["looks like folders with splits, but lacks val/masks"]),
        (break_other_folder, ["expected VOC 2012", "train/images", "classes.txt", "found holiday/, notes.txt"]),
        (break_empty, ["found an empty folder"]),
        (break_class_list, ["classes.txt: expected a list of classes, found no such file", "one per line"]),
        (
            break_all_masks,
            ["expected photos with masks for the split val, but none of 4 is usable", "first reason: 00.png"],
        ),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_invalid_data_is_rejected_with_what_was_expected_and_found(
    dvit: Dvit, data: Path, out: Path, damage: Callable[[Path], None], words: Sequence[str]
) -> None:
    damage(data)
    done = dvit("evaluate", "knn", "--data", data, "-o", out, *FEW)
    assert done.code == 2
    assert str(data) in done.err
    for word in words:
        assert word in done.err
    assert_no_results(out)


@pytest.mark.usefixtures("no_model")
def test_missing_data_leaves_no_empty_results_file(dvit: Dvit, data: Path, tmp_path: Path) -> None:
    for verb in ("knn", "artifacts"):
        out = tmp_path / "new" / "results.jsonl"
        assert dvit("evaluate", verb, "--data", data / "gone", "-o", out).code == 2
        assert not out.exists()


OTHER_FILES = {
    "notes": b"buy milk\nand bread\n",
    "one note": b"buy milk\n",
    "other JSON": b'{"name": "cat"}\n{"name": "dog"}\n',
    "one line of other JSON": b'{"name": "cat"}\n',
    "numbers": b"1\n2\n",
    "picture": bytes(range(128, 256)),
}


@pytest.mark.parametrize("content", OTHER_FILES.values(), ids=OTHER_FILES)
@pytest.mark.parametrize("verb", ["knn", "artifacts"])
def test_file_with_other_content_is_not_overwritten(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, photos: Path, out: Path, verb: str, content: bytes
) -> None:
    out.write_bytes(content)
    done = dvit(*command_of(verb, data, photos, out))
    assert out.read_bytes() == content
    assert done.code == 2
    assert str(out) in done.err and "choose another file with -o" in done.err


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.usefixtures("no_model")
def test_results_cannot_be_a_folder_or_below_a_file(dvit: Dvit, data: Path, photos: Path, verb: str) -> None:
    file = data / "classes.txt"
    for out in (data, file / "results.jsonl"):
        done = dvit(*command_of(verb, data, photos, out))
        assert done.code == 2
        assert f"cannot write results to {out}" in done.err
        assert "choose another file with -o" in done.err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="may write anywhere")
@pytest.mark.usefixtures("no_model")
def test_results_in_a_folder_without_permission_are_refused(dvit: Dvit, data: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    done = dvit(*command_of("knn", data, data, locked / "results.jsonl"))
    assert done.code == 2
    assert "cannot write results to" in done.err


def test_unwritable_cache_is_reported(dvit: Dvit, planted: tiny_artifact.Planted, data: Path, out: Path) -> None:
    for features in ("raw", "exact"):
        done = dvit(
            *("evaluate", "knn", "--data", data, "--features", features, "-o", out, *FEW),
            *("--cache", data / "classes.txt"),
        )
        assert done.code != 0
        assert str(data / "classes.txt") in done.err


def test_results_path_without_suffix_has_the_cache_next_to_it(
    dvit: Dvit, planted: tiny_artifact.Planted, data: Path, tmp_path: Path
) -> None:
    done = dvit("evaluate", "knn", "--data", data, "--features", "raw", "-o", tmp_path / "results", *FEW)
    assert done.code == 0, done.err
    assert (tmp_path / "results.cache").is_dir()


# --- help ---


def test_help_names_the_tasks(dvit: Dvit) -> None:
    done = dvit("evaluate", "--help")
    assert done.code == 0
    for word in ("knn", "segmentation", "artifacts", "Nearest-neighbour", "linear probe", "dvit diagnose"):
        assert word in done.words


def test_knn_help_lists_data_layouts_features_and_options(dvit: Dvit) -> None:
    done = dvit("evaluate", "knn", "--help")
    assert done.code == 0
    for word in (
        *(
            "VOCdevkit/VOC2012",
            "ADEChallengeData2016",
            "train/ and val/",
            "classes.txt",
            "raw (",
            "subtract (",
            "exact (",
        ),
        *("dvit calibrate", "--artifact", "--backbone", "--k ", "--size", "results.jsonl", "--cache", "--json"),
    ):
        assert word in done.words


@pytest.mark.parametrize("verb", ["knn", "segmentation"])
def test_help_omits_unsupported_exact_options(dvit: Dvit, verb: str) -> None:
    done = dvit("evaluate", verb, "--help")
    assert "--exact.neural" not in done.out
    assert "--exact.method" not in done.out


def test_missing_arguments_exit_2(dvit: Dvit) -> None:
    assert dvit("evaluate").code == 2
    done = dvit("evaluate", "knn")
    assert done.code == 2
    assert "--data" in done.words


# --- report ---


@pytest.fixture
def results(dvit: Dvit, planted: tiny_artifact.Planted, data: Path, photos: Path, out: Path) -> Path:
    for verb in VERBS:
        done: Outcome = dvit(*command_of(verb, data, photos, out))
        assert done.code == 0, done.err
    return out


def test_report_has_the_metrics_of_all_lines(dvit: Dvit, results: Path, tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    done = dvit("report", results, "-o", page)
    assert (done.code, done.out) == (0, ""), done.err
    assert f"6 entries in {page}" in done.err
    text = page.read_text()
    for line in lines_of(results):
        if line["task"] == "artifacts":
            continue
        (row,) = [row for row in text.splitlines() if row.startswith(f"| {line['features']} ") and in_row(line, row)]
        if line["paired"]:
            assert f"{line['paired']['difference']:+.2f}" in row
    for heading in ("Nearest neighbours", "Segmentation by a trained head", "Label-free figures", "Published"):
        assert f"## {heading}" in text
    assert str(tmp_path) not in text.replace(lines_of(results)[0]["run"]["command"], "")


def in_row(line: Line, row: str) -> bool:
    return all(f"{line['metrics'][name]:.2f}" in row for name in ("mIoU", "mAcc", "aAcc"))


def test_report_is_reproducible(dvit: Dvit, results: Path, tmp_path: Path) -> None:
    pages = [tmp_path / name for name in ("a.md", "b.md")]
    for page in pages:
        assert dvit("report", results, "-o", page).code == 0
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_report_skips_and_reports_a_truncated_line(dvit: Dvit, results: Path, tmp_path: Path) -> None:
    results.write_bytes(results.read_bytes()[:-40])
    done = dvit("report", results, "-o", tmp_path / "results.md")
    assert done.code == 1
    assert f"skipped: {results}:6: " in done.err
    assert "5 entries" in done.err


def test_report_without_usable_results_is_rejected(dvit: Dvit, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    for content, words in ((None, "cannot be read"), (b"", "got no usable line")):
        if content is not None:
            empty.write_bytes(content)
        done = dvit("report", empty, "-o", tmp_path / "results.md")
        assert done.code == 2
        assert str(empty) in done.err and words in done.err
        assert not (tmp_path / "results.md").exists()
    assert dvit("report", "-o", tmp_path / "results.md").code == 2
    assert dvit("report", empty).code == 2


def test_report_rejects_unsuitable_output_paths(dvit: Dvit, tmp_path: Path) -> None:
    results = tmp_path / "results.md"
    results.write_bytes(b"{}\n")
    for out, words in (
        (results, "one of the results files"),
        (tmp_path / "page.html", "expected a .md file"),
        (tmp_path / "gone" / "page.md", "existing folder"),
    ):
        done = dvit("report", results, "-o", out)
        assert done.code == 2
        assert words in done.err
    assert results.read_bytes() == b"{}\n"
