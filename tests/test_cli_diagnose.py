"""`dvit diagnose` on the command line: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import denoising_vit as dv
import tiny_fit as tiny
from denoising_vit.cli.app import run

#: A field of 3 x 3 nodes and the default of 8 views: enough, and all photos take a second.
SMALL = ("--size", "48", "--device", "cpu", "--dtype", "float32", "--backbone", tiny.MODEL)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_photos(tmp_path_factory.mktemp("photos"), 12)


def diagnose(data: Path, out: Path, weights: Path, *more: str) -> int:
    return run(["diagnose", str(data), "-o", str(out), *SMALL, "--weights", str(weights), *more])


def test_diagnose_writes_page_record_and_artifact(
    photos: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert diagnose(photos, tmp_path / "out", weights) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "artifact.safetensors",
        "diagnosis.html",
        "diagnosis.json",
    ]
    record = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    printed = capsys.readouterr()
    assert " ".join(record["verdict"]["words"].split()) in " ".join(printed.out.split())
    assert "verdict" in printed.out and "effective rank" in printed.out
    assert "12 photos" in printed.err
    backbone = dv.load_backbone(tiny.MODEL, weights=str(weights), device="cpu", dtype="float32")
    assert dv.load_artifact(tmp_path / "out" / "artifact.safetensors", backbone).grid == (3, 3)


def test_json_is_one_line(photos: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert diagnose(photos, tmp_path, weights, "--json", "--photos", "8") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert len(json.loads(line)["photos"]) == 8


def test_unusable_photos_are_reported_and_exit_1(
    photos: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for photo in photos.iterdir():
        (data / photo.name).write_bytes(photo.read_bytes())
    (data / "broken.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((90, 90, 3), np.uint8)).save(data / "dark.png")
    assert diagnose(data, tmp_path / "out", weights) == 1
    printed = capsys.readouterr().err
    assert "broken.png" in printed
    assert "dark.png: no content" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--photos", "-1"), "--photos must be at least 0 (all)"),
        (("--views", "1"), "views must be at least 2"),
        (("--photos", "5"), "5 usable photos; a diagnosis needs at least 8"),
        (("--size", "50"), "does not fit the patch grid"),
    ],
)
def test_wrong_options_exit_2_with_a_message(
    photos: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, str],
    message: str,
) -> None:
    assert diagnose(photos, tmp_path / "out", weights, *more) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "diagnosis.html").exists()


def test_unwritable_output_folder_exits_2(
    photos: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert diagnose(photos, tmp_path / "file" / "out", weights) == 2
    assert "cannot write to" in capsys.readouterr().err
