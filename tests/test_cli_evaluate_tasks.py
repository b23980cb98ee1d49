"""`dvit evaluate discovery` and `correspondence`: lines, tables, exit codes, messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_correspondence as videos
import tiny_discovery as boxes
from command import Dvit, in_process
from denoising_vit.backbones import Backbone, BackboneSpec
from tiny_labelled import tiny_backbone

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def dvit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dvit:
    """Runs `dvit ...`; a backbone of mean colours replaces any model."""
    monkeypatch.setattr(BackboneSpec, "load", lambda _spec: tiny_backbone())
    return in_process(capsys, monkeypatch)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors in a command must be reported before a model is loaded."""

    def load(_spec: BackboneSpec) -> Backbone:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(BackboneSpec, "load", load)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- discovery ---


def test_discovery_writes_a_line_that_the_report_shows(dvit: Dvit, tmp_path: Path, out: Path) -> None:
    boxes.write_voc(tmp_path / "VOC2007", boxes.scenes(4))
    command = ("evaluate", "discovery", "--data", tmp_path / "VOC2007", "--features", "raw", "-o", out)
    done = dvit(*command, "--seed-by", "norm", "--centred")
    assert done.code == 0, done.err
    (line,) = lines_of(out)
    assert (line["task"], line["settings"]["seed_by"], line["settings"]["centred"]) == ("discovery", "norm", True)
    assert line["images"] == {"val": 4}
    assert f"CorLoc {line['metrics']['CorLoc']:.2f} in" in done.err
    assert "CorLoc" in done.out and "mIoU" not in done.out
    assert dvit("report", out, "-o", tmp_path / "results.md").code == 0
    text = (tmp_path / "results.md").read_text()
    assert "## Object discovery" in text
    assert "| vit_base_patch14_dinov2.lvd142m | denoised | 58.0 | - | 60.3 | - | 46.7 | - |" in text


def test_repeated_command_keeps_existing_results(dvit: Dvit, tmp_path: Path, out: Path) -> None:
    boxes.write_folders(tmp_path / "data", boxes.scenes(3))
    command = ("evaluate", "discovery", "--data", tmp_path / "data", "--features", "raw", "-o", out)
    dvit(*command)
    before = out.read_bytes()
    again = dvit(*command)
    assert (again.code, out.read_bytes()) == (0, before)
    assert "kept from an earlier run" in again.err


def test_photo_without_objects_is_skipped_and_reported(dvit: Dvit, tmp_path: Path, out: Path) -> None:
    every = boxes.scenes(3)
    root = boxes.write_voc(tmp_path / "VOC2007", every)
    xml = sorted((root / "Annotations").iterdir())[0]
    xml.write_text(boxes.voc_xml((48, 48)))
    done = dvit("evaluate", "discovery", "--data", root, "--features", "raw", "-o", out)
    assert done.code == 1
    assert xml.stem in done.err and "skipped" in done.err
    assert lines_of(out)[0]["images"] == {"val": 2}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--k", 0), "k must be at least 1, got 0"),
        (("--iou", 1.5), "iou must be above 0 and at most 1, got 1.5"),
        (("--features", "raw,blue"), "unknown features: 'blue'"),
        (("--annotations", "boxes.json"), "annotations"),
    ],
)
def test_invalid_discovery_options_are_reported(
    dvit: Dvit, tmp_path: Path, out: Path, more: tuple[object, ...], words: str
) -> None:
    boxes.write_folders(tmp_path / "data", boxes.scenes(2))
    done = dvit("evaluate", "discovery", "--data", tmp_path / "data", "-o", out, *more)
    assert done.code == 2
    assert words in done.err and "Traceback" not in done.err


# --- correspondence ---


def test_videos_are_evaluated_by_label_propagation(dvit: Dvit, tmp_path: Path, out: Path) -> None:
    videos.write_davis(tmp_path / "davis", {"one": videos.moving(4), "two": videos.moving(4, seed=1)})
    done = dvit("evaluate", "correspondence", "--data", tmp_path / "davis", "--features", "raw", "-o", out)
    assert done.code == 0, done.err
    (line,) = lines_of(out)
    assert line["task"] == "propagation"
    assert line["metrics"]["J&F"] == pytest.approx((line["metrics"]["J"] + line["metrics"]["F"]) / 2)
    assert f"J&F {line['metrics']['J&F']:.2f} in" in done.err
    assert dvit("report", out, "-o", tmp_path / "results.md").code == 0
    text = (tmp_path / "results.md").read_text()
    assert "## Label propagation in video" in text
    assert "| features | J&amp;F | J | F |" in text


def test_pairs_with_keypoints_are_evaluated_by_matching(dvit: Dvit, tmp_path: Path, out: Path) -> None:
    videos.write_spair(tmp_path / "spair", [(0, 1), (1, 2)])
    command = ("evaluate", "correspondence", "--data", tmp_path / "spair", "--features", "raw", "-o", out)
    done = dvit(*command, "--pairs.alpha", 0.2)
    assert done.code == 0, done.err
    (line,) = lines_of(out)
    assert (line["task"], line["settings"]["alpha"]) == ("matching", [0.2])
    assert "PCK" in done.out
    assert dvit(*command).code == 0
    assert [line["settings"]["alpha"] for line in lines_of(out)] == [[0.2], [0.05], [0.1], [0.15]]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--videos.k", 0), "k must be at least 1, got 0"),
        (("--videos.temperature", 0), "temperature must be a positive number, got 0"),
        (("--pairs.alpha", -1), "alpha must be one or more different positive numbers"),
    ],
)
def test_invalid_correspondence_options_are_reported(
    dvit: Dvit, tmp_path: Path, out: Path, more: tuple[object, ...], words: str
) -> None:
    done = dvit("evaluate", "correspondence", "--data", tmp_path, "-o", out, *more)
    assert done.code == 2
    assert words in done.err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("task", ["discovery", "correspondence"])
def test_unknown_folder_is_rejected_with_what_was_expected(dvit: Dvit, tmp_path: Path, out: Path, task: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "holiday.txt").write_text("sun")
    done = dvit("evaluate", task, "--data", tmp_path / "data", "-o", out)
    assert done.code == 2
    assert "expected" in done.err and "holiday.txt" in done.err
    assert not out.exists()
