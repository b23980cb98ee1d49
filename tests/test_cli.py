"""`dvit denoise` from the command line: files, table, JSON lines, exit codes, messages, interrupted runs."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage import data

import denoising_vit.decomposition.result
import denoising_vit.maps
from denoising_vit import Decomposition
from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli import app
from denoising_vit.denoise import Denoising

#: A small random ViT on a grid of 6 x 6.
FAST = [
    *("--weights", "random", "--backbone", "test_vit", "--size", "96", "--views", "8"),
    *("--held-out", "2", "--dtype", "float32", "--device", "cpu"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclasses.dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The JSON lines of standard output; fails if it has any other line."""
        return [json.loads(line) for line in self.out.splitlines()]


Dvit = Callable[..., Outcome]
REAL_PANEL = denoising_vit.maps.draw_panel


@pytest.fixture
def dvit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dvit:
    """Runs `dvit denoise ...` in this process with FAST; draws 1 x 1 pictures. Given options override FAST."""
    monkeypatch.setenv("COLUMNS", "200")  # no wrapped lines
    monkeypatch.setattr(denoising_vit.maps, "draw_panel", draw_dot)

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = app.run(["denoise", *FAST, *map(str, arguments)])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def real_panels(dvit: Dvit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws full pictures instead of dots."""
    monkeypatch.setattr(denoising_vit.maps, "draw_panel", REAL_PANEL)


def draw_dot(_photo: np.ndarray, _result: Decomposition, path: Path, **_options: Any) -> None:
    Image.new("RGB", (1, 1)).save(path, format="PNG")


def cat(path: Path, *, bright: int = 0) -> Path:
    """Writes a small photo; another brightness gives other pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.asarray(Image.fromarray(data.chelsea()).resize((90, 60))).astype(int) + bright
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stamps(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and content of each file."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def never(*_arguments: Any, **_options: Any) -> None:
    raise AssertionError("this must not be called")


@pytest.fixture
def no_computing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Returns a function that makes later runs of stage 1 fail."""
    return lambda: monkeypatch.setattr(Denoising, "__call__", never)


# --- success ---


def test_success_writes_a_result_and_a_picture_and_prints_a_table(
    dvit: Dvit, real_panels: None, tmp_path: Path
) -> None:
    one, two = cat(tmp_path / "one.jpg"), cat(tmp_path / "two.png", bright=20)
    done = dvit(one, two, "-o", tmp_path / "new" / "out")
    assert done.code == 0
    assert listing(tmp_path / "new" / "out") == ["one.png", "one.safetensors", "two.png", "two.safetensors"]
    lines = done.out.splitlines()
    assert re.match(r"photo +result +views +held-out R² +cosine +seconds", lines[0])
    assert re.match(r"one\.jpg +one\.safetensors +8 +-?\d\.\d{3} +-?\d\.\d{3} +\d+\.\d", lines[1])
    assert re.match(r"two\.png +two\.safetensors +8 ", lines[2])
    assert "2 of 2 photos done" in done.err
    assert "fingerprint" in done.err  # of the weights
    with Image.open(tmp_path / "new" / "out" / "one.png") as panel:
        assert panel.format == "PNG"
        assert panel.width > 1000


def test_loaded_result_has_the_stored_semantic_features(dvit: Dvit, tmp_path: Path) -> None:
    dvit(cat(tmp_path / "one.jpg"), "-o", tmp_path / "out")
    path = tmp_path / "out" / "one.safetensors"
    loaded, stored = Decomposition.load(path), load_file(path)
    assert set(stored) == {"field", "semantic", "artifact", "raw"}
    assert loaded.semantic.shape == (6, 6, 64)
    tolerance = 2e-3 * float(loaded.semantic.abs().max())
    torch.testing.assert_close(loaded.semantic, stored["semantic"].float(), rtol=0, atol=tolerance)
    assert loaded.info["photo"]["name"] == "one.jpg"
    assert (loaded.info["views"], loaded.info["seed"]) == (8, 0)
    assert loaded.info["backbone"]["name"] == "test_vit"


def test_json_prints_one_line_per_photo_and_nothing_else(dvit: Dvit, tmp_path: Path) -> None:
    one, two = cat(tmp_path / "one.jpg"), cat(tmp_path / "two.jpg", bright=20)
    done = dvit(one, two, "-o", tmp_path / "out", "--json")
    assert done.code == 0
    assert [row["image"] for row in done.rows] == [str(one), str(two)]
    for row, name in zip(done.rows, ("one", "two"), strict=True):
        keys = {"image", "status", "output", "panel", "seconds", "views", "heldout_r2", "heldout_cosine"}
        assert set(row) == keys | {"note"}
        assert row["status"] == "done"
        assert Path(row["output"]) == tmp_path / "out" / f"{name}.safetensors"
        assert Path(row["panel"]) == tmp_path / "out" / f"{name}.png"
        assert Path(row["output"]).is_file() and Path(row["panel"]).is_file()
        assert row["views"] == 8
        assert row["seconds"] >= 0
        assert row["heldout_r2"] <= 1 and -1 <= row["heldout_cosine"] <= 1


def test_json_of_a_kept_photo_has_the_same_keys_and_a_note(dvit: Dvit, tmp_path: Path) -> None:
    one = cat(tmp_path / "one.jpg")
    (first,) = dvit(one, "-o", tmp_path / "out", "--json").rows
    (again,) = dvit(one, "-o", tmp_path / "out", "--json").rows
    assert again["status"] == "kept"
    assert set(again) == set(first) | {"note"}
    for key in ("output", "panel", "views", "heldout_r2", "heldout_cosine"):
        assert again[key] == first[key]


def test_json_keys_do_not_depend_on_the_options(dvit: Dvit, tmp_path: Path) -> None:
    """Unknown values are null, so that scripts need not check for each key."""
    (row,) = dvit(cat(tmp_path / "one.jpg"), "-o", tmp_path / "out", "--held-out", "0", "--json").rows
    assert row["heldout_r2"] is None and row["heldout_cosine"] is None


def test_folder_and_glob_inputs(dvit: Dvit, tmp_path: Path) -> None:
    cat(tmp_path / "in" / "deep" / "one.jpg")
    cat(tmp_path / "in" / "two.jpg", bright=20)
    cat(tmp_path / "globbed" / "three.jpg", bright=40)
    done = dvit(tmp_path / "in", tmp_path / "globbed" / "*.jpg", "-o", tmp_path / "out", "--json")
    assert done.code == 0
    assert [Path(row["output"]).stem for row in done.rows] == ["one", "two", "three"]


def test_without_held_out_views_the_table_has_dashes(dvit: Dvit, tmp_path: Path) -> None:
    done = dvit(cat(tmp_path / "one.jpg"), "-o", tmp_path / "out", "--held-out", "0")
    assert done.code == 0
    assert re.search(r"one\.safetensors +8 +- +- +\d", done.out)


def test_upsample_stores_finer_features(dvit: Dvit, real_panels: None, tmp_path: Path) -> None:
    done = dvit(cat(tmp_path / "one.jpg"), "-o", tmp_path / "out", "--upsample", "2")
    assert done.code == 0
    path = tmp_path / "out" / "one.safetensors"
    stored = load_file(path)["upsampled"]
    assert stored.shape == (12, 12, 64)
    expected = Decomposition.load(path).upsample(2)
    torch.testing.assert_close(stored.float(), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


def test_non_square_size(dvit: Dvit, tmp_path: Path) -> None:
    done = dvit(cat(tmp_path / "one.jpg"), "-o", tmp_path / "out", "--size", "64", "96")
    assert done.code == 0
    assert Decomposition.load(tmp_path / "out" / "one.safetensors").semantic.shape == (4, 6, 64)


# --- photos that cannot be used ---


def refused(dvit: Dvit, bad: Path, tmp_path: Path) -> str:
    """Runs a good and a bad photo; returns the message about the bad one."""
    good = cat(tmp_path / "good" / "good.jpg")
    done = dvit(bad, good, "-o", tmp_path / "out")
    assert done.code == 1
    assert listing(tmp_path / "out") == ["good.png", "good.safetensors"]
    assert "1 of 2 photos done" in done.err and "1 skipped" in done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("skipped:")]
    assert str(bad) in line
    return line


def test_missing_photo_among_good_ones(dvit: Dvit, tmp_path: Path) -> None:
    assert "no such file or folder" in refused(dvit, tmp_path / "missing.jpg", tmp_path)


def test_missing_photo_is_named_when_the_reason_contains_its_name(
    dvit: Dvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = dvit("file", "-o", "out")
    assert "skipped: file: no such file or folder" in done.err


def test_only_missing_photos_exit_2(dvit: Dvit, tmp_path: Path) -> None:
    done = dvit(tmp_path / "a.jpg", tmp_path / "b.jpg", "-o", tmp_path / "out")
    assert done.code == 2
    assert done.out == ""
    for name in ("a.jpg", "b.jpg"):
        assert f"{tmp_path / name}: no such file or folder" in done.err
    assert not (tmp_path / "out").exists()


def test_directory_without_images(dvit: Dvit, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    assert "no image files in this folder" in refused(dvit, folder, tmp_path)


def test_file_that_is_not_an_image(dvit: Dvit, tmp_path: Path) -> None:
    path = tmp_path / "words.jpg"
    path.write_text("words")
    assert "not an image file" in refused(dvit, path, tmp_path)


def test_truncated_file(dvit: Dvit, tmp_path: Path) -> None:
    path = cat(tmp_path / "cut.jpg")
    path.write_bytes(path.read_bytes()[:-300])
    assert "damaged or unreadable image" in refused(dvit, path, tmp_path)


def test_empty_file(dvit: Dvit, tmp_path: Path) -> None:
    path = tmp_path / "empty.jpg"
    path.touch()
    assert "the file is empty (0 bytes)" in refused(dvit, path, tmp_path)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (20_000, 10)])
def test_photo_smaller_than_a_patch(dvit: Dvit, tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "small.png"
    Image.new("RGB", (width, height)).save(path)
    line = refused(dvit, path, tmp_path)
    assert f"{width} x {height} pixels" in line
    assert "at least 16" in line
    assert "the image:" not in line  # the file name is used instead


def test_very_long_photo_works(dvit: Dvit, real_panels: None, tmp_path: Path) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (20, 20_000, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "long.png")
    assert dvit(tmp_path / "long.png", "-o", tmp_path / "out").code == 0
    assert listing(tmp_path / "out") == ["long.png", "long.safetensors"]
    assert torch.isfinite(Decomposition.load(tmp_path / "out" / "long.safetensors").semantic).all()


def test_decompression_bomb(dvit: Dvit, tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0))
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b""))
    assert "100,000,000" in refused(dvit, path, tmp_path)


def test_json_reports_failures_as_lines(dvit: Dvit, tmp_path: Path) -> None:
    bad = tmp_path / "empty.jpg"
    bad.touch()
    missing = tmp_path / "missing.jpg"
    done = dvit(bad, missing, cat(tmp_path / "good.jpg"), "-o", tmp_path / "out", "--json")
    assert done.code == 1
    status = {Path(row["image"]).name: row["status"] for row in done.rows}
    assert status == {"empty.jpg": "failed", "missing.jpg": "failed", "good.jpg": "done"}
    notes = {Path(row["image"]).name: str(row.get("note")) for row in done.rows}
    assert "0 bytes" in notes["empty.jpg"] and "no such file" in notes["missing.jpg"]


def test_name_too_long_for_the_file_system_does_not_stop_the_batch(dvit: Dvit, tmp_path: Path) -> None:
    done = dvit(tmp_path / ("a" * 300 + ".jpg"), cat(tmp_path / "good.jpg"), "-o", tmp_path / "out")
    assert done.code == 1
    assert "good.safetensors" in listing(tmp_path / "out")


# --- names of results ---


def test_two_photos_with_the_same_name_keep_both_results(
    dvit: Dvit, tmp_path: Path, no_computing: Callable[[], None]
) -> None:
    one, two = cat(tmp_path / "a" / "same.jpg"), cat(tmp_path / "b" / "same.jpg", bright=30)
    done = dvit(one, two, "-o", tmp_path / "out", "--json")
    assert done.code == 0
    names = ["same-2.png", "same-2.safetensors", "same.png", "same.safetensors"]
    assert listing(tmp_path / "out") == names
    assert [Path(row["output"]).name for row in done.rows] == ["same.safetensors", "same-2.safetensors"]
    before = stamps(tmp_path / "out")

    no_computing()
    again = dvit(one, two, "-o", tmp_path / "out", "--json")
    assert again.code == 0
    assert [row["status"] for row in again.rows] == ["kept", "kept"]
    assert [Path(row["output"]).name for row in again.rows] == ["same.safetensors", "same-2.safetensors"]
    assert stamps(tmp_path / "out") == before

    alone = dvit(two, "-o", tmp_path / "out", "--json")  # finds its own result without the other photo
    assert [Path(row["output"]).name for row in alone.rows] == ["same-2.safetensors"]
    assert stamps(tmp_path / "out") == before


def test_identical_files_with_the_same_name_keep_both_results(
    dvit: Dvit, tmp_path: Path, no_computing: Callable[[], None]
) -> None:
    one, two = cat(tmp_path / "a" / "same.png"), cat(tmp_path / "b" / "same.png")
    assert one.read_bytes() == two.read_bytes()
    dvit(one, two, "-o", tmp_path / "out")
    names = ["same-2.png", "same-2.safetensors", "same.png", "same.safetensors"]
    assert listing(tmp_path / "out") == names
    before = stamps(tmp_path / "out")
    no_computing()
    assert dvit(one, two, "-o", tmp_path / "out").code == 0
    assert stamps(tmp_path / "out") == before


def test_later_photo_of_the_same_name_does_not_overwrite(dvit: Dvit, tmp_path: Path) -> None:
    dvit(cat(tmp_path / "a" / "same.jpg"), "-o", tmp_path / "out")
    before = stamps(tmp_path / "out")
    dvit(cat(tmp_path / "b" / "same.jpg", bright=30), "-o", tmp_path / "out")
    after = stamps(tmp_path / "out")
    assert set(after) == {*before, "same-2.png", "same-2.safetensors"}
    assert {name: after[name] for name in before} == before


def test_overwrite_does_not_touch_results_of_another_photo(dvit: Dvit, tmp_path: Path) -> None:
    one, two = cat(tmp_path / "a" / "same.jpg"), cat(tmp_path / "b" / "same.jpg", bright=30)
    dvit(one, two, "-o", tmp_path / "out")
    before = stamps(tmp_path / "out")
    dvit(two, "-o", tmp_path / "out", "--overwrite")  # its result is same-2
    after = stamps(tmp_path / "out")
    assert set(after) == set(before)
    assert after["same.safetensors"] == before["same.safetensors"]
    assert after["same.png"] == before["same.png"]


def test_unrelated_safetensors_with_the_same_name_is_kept(dvit: Dvit, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "one.safetensors").write_bytes(b"somebody's weights")
    assert dvit(cat(tmp_path / "one.jpg"), "-o", out).code == 0
    assert (out / "one.safetensors").read_bytes() == b"somebody's weights"
    assert (out / "one-2.safetensors").is_file()


def test_output_into_the_photo_folder_does_not_overwrite_photos(dvit: Dvit, tmp_path: Path) -> None:
    photo = cat(tmp_path / "one.png")  # the result picture would have the same name
    before = photo.read_bytes()
    done = dvit(photo, "-o", tmp_path)
    assert photo.read_bytes() == before
    assert done.code == 0
    assert listing(tmp_path) == ["one-2.png", "one-2.safetensors", "one.png"]


def test_unrelated_picture_with_the_same_name_is_kept(dvit: Dvit, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = cat(out / "one.png", bright=50).read_bytes()
    dvit(cat(tmp_path / "one.jpg"), "-o", out)
    assert (out / "one.png").read_bytes() == before


def test_result_pictures_are_not_read_as_photos_in_the_next_run(dvit: Dvit, real_panels: None, tmp_path: Path) -> None:
    cat(tmp_path / "in" / "one.jpg")
    out = tmp_path / "in" / "results"
    dvit(tmp_path / "in", "-o", out)
    again = dvit(tmp_path / "in", "-o", out, "--json")
    assert [Path(row["image"]).name for row in again.rows] == ["one.jpg"]
    assert listing(out) == ["one.png", "one.safetensors"]


# --- existing results ---


def test_existing_results_are_kept(dvit: Dvit, tmp_path: Path, no_computing: Callable[[], None]) -> None:
    photo = cat(tmp_path / "one.jpg")
    dvit(photo, "-o", tmp_path / "out")
    before = stamps(tmp_path / "out")
    no_computing()
    again = dvit(photo, "-o", tmp_path / "out")
    assert again.code == 0
    assert stamps(tmp_path / "out") == before
    assert re.search(r"one\.jpg .* kept$", again.out.splitlines()[1].rstrip())


def test_only_new_photos_are_computed(dvit: Dvit, tmp_path: Path) -> None:
    one = cat(tmp_path / "in" / "one.jpg")
    dvit(one, "-o", tmp_path / "out")
    cat(tmp_path / "in" / "two.jpg", bright=20)
    rows = dvit(tmp_path / "in", "-o", tmp_path / "out", "--json").rows
    assert [(Path(row["image"]).name, row["status"]) for row in rows] == [("one.jpg", "kept"), ("two.jpg", "done")]


def test_result_is_kept_after_the_photo_has_moved(dvit: Dvit, tmp_path: Path, no_computing: Callable[[], None]) -> None:
    one = cat(tmp_path / "one.jpg")
    dvit(one, "-o", tmp_path / "out")
    (tmp_path / "moved").mkdir()
    moved = Path(shutil.move(one, tmp_path / "moved" / "one.jpg"))
    no_computing()
    (row,) = dvit(moved, "-o", tmp_path / "out", "--json").rows
    assert row["status"] == "kept"


def test_overwrite_recomputes_photos(dvit: Dvit, tmp_path: Path) -> None:
    photo = cat(tmp_path / "one.jpg")
    dvit(photo, "-o", tmp_path / "out")
    result = tmp_path / "out" / "one.safetensors"
    first = Decomposition.load(result)
    inode = result.stat().st_ino
    (row,) = dvit(photo, "-o", tmp_path / "out", "--overwrite", "--seed", "7", "--json").rows
    assert row["status"] == "done"
    assert listing(tmp_path / "out") == ["one.png", "one.safetensors"]
    assert result.stat().st_ino != inode
    second = Decomposition.load(result)
    assert second.info["seed"] == 7
    assert not torch.equal(second.field, first.field)


def test_deleted_picture_is_drawn_again_without_computing(
    dvit: Dvit, real_panels: None, tmp_path: Path, no_computing: Callable[[], None]
) -> None:
    photo, out = cat(tmp_path / "one.jpg"), tmp_path / "out"
    dvit(photo, "-o", out)
    before = stamps(out)
    (out / "one.png").unlink()
    no_computing()
    again = dvit(photo, "-o", out)
    assert again.code == 0
    assert listing(out) == ["one.png", "one.safetensors"]
    assert stamps(out)["one.safetensors"] == before["one.safetensors"]
    with Image.open(out / "one.png") as panel:
        assert panel.width > 1000


def test_existing_result_of_other_settings_is_kept_with_a_note(dvit: Dvit, tmp_path: Path) -> None:
    photo = cat(tmp_path / "one.jpg")
    dvit(photo, "-o", tmp_path / "out")
    before = stamps(tmp_path / "out")
    changes = "--seed 1", "--views 9", "--size 112", "--smoothness 0.5", "--clip 3", "--layer 3", "--coverage plain"
    for change in changes:
        (row,) = dvit(photo, "-o", tmp_path / "out", "--json", *change.split()).rows
        assert row["status"] == "kept", change
        assert "other settings" in row["note"] and "--overwrite" in row["note"], change
    assert stamps(tmp_path / "out") == before


def test_existing_result_without_upsampled_features_is_noted_or_redone(dvit: Dvit, tmp_path: Path) -> None:
    photo = cat(tmp_path / "one.jpg")
    dvit(photo, "-o", tmp_path / "out")
    (row,) = dvit(photo, "-o", tmp_path / "out", "--upsample", "2", "--json").rows
    stored = load_file(tmp_path / "out" / "one.safetensors")
    assert "upsampled" in stored or "--overwrite" in row["note"]


def test_result_with_a_damaged_header_does_not_stop_the_batch(dvit: Dvit, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    out = tmp_path / "out"
    out.mkdir()
    head = {"format": "denoising-vit/decomposition", "format_version": 1}
    save_file({"field": torch.zeros(1)}, out / "one.safetensors", metadata={"denoising_vit": json.dumps(head)})
    done = dvit(cat(tmp_path / "one.jpg"), cat(tmp_path / "two.jpg"), "-o", out)
    assert done.code == 0
    assert listing(out) == [
        *("one-2.png", "one-2.safetensors", "one.safetensors"),
        *("two.png", "two.safetensors"),
    ]


# --- wrong usage ---


def test_no_inputs(dvit: Dvit, tmp_path: Path) -> None:
    done = dvit("-o", tmp_path / "out")
    assert done.code == 2
    assert "no input" in done.err and "dvit denoise photo.jpg -o out" in done.err


@pytest.mark.parametrize("place", ["file/out", "file"])
def test_output_that_cannot_be_written_to(dvit: Dvit, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    done = dvit(cat(tmp_path / "one.jpg"), "-o", tmp_path / place)
    assert done.code == 2
    assert done.out == ""
    assert f"cannot write to {tmp_path / place}" in done.err
    assert "-o" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "100"], "side of 100 pixels .* multiple of 16 .* Nearest: 96 or 112"),
        (["--views", "4"], "4 views of 6 x 6 patches are too few .* expected at least 5"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--backbone", "vit_nonsense"], "no model 'vit_nonsense'"),
        (["--backbone", "resnet18"], "resnet18 is not a plain ViT"),
        (["--weights", "nowhere.pth"], "nowhere.pth: no such"),
        (["--upsample", "0"], "--upsample must be a whole number of at least 1, got 0"),
        (["--layer", "6"], "layer must be -6 to 5, got 6"),
        (["--stride", "0"], "stride must be 1 to the patch size"),
        (["--resolution", "1"], "at least 2 x 2 nodes"),
        (["--device", "nonsense"], "device 'nonsense' is not available"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_value_is_rejected_before_any_photo_is_processed(
    dvit: Dvit, tmp_path: Path, options: list[str], message: str
) -> None:
    done = dvit(cat(tmp_path / "one.jpg"), "-o", tmp_path / "out", *options)
    assert done.code == 2
    assert done.out == ""
    (line,) = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert re.search(message, line)
    assert not (tmp_path / "out").exists() or listing(tmp_path / "out") == []


@pytest.mark.parametrize("options", [["--nonsense"], ["--dtype", "int8"], ["--views", "many"]], ids=" ".join)
def test_unknown_option_or_choice_exits_with_2(
    dvit: Dvit, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        dvit(cat(tmp_path / "one.jpg"), "-o", tmp_path / "out", *options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--held-out", "--batch-size", "--clip"])
def test_option_out_of_range_is_named_as_it_is_typed(
    dvit: Dvit, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        done = dvit(cat(tmp_path / "one.jpg"), "-o", tmp_path / "out", option, "-1")
        code, err = done.code, done.err
    except SystemExit as exit:
        code, err = exit.code, capsys.readouterr().err
    assert code == 2
    assert option.strip("-").replace("-", "_") in err.replace("-", "_")
    assert "dummy" not in err  # an internal name of the parser


def test_missing_output_option_exits_with_2(dvit: Dvit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        dvit(cat(tmp_path / "one.jpg"))
    assert caught.value.code == 2
    assert "--out" in capsys.readouterr().err


def test_help_exits_with_0(dvit: Dvit, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        dvit("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in ("--out", "--backbone", "--weights", "--views", "--size", "--overwrite", "--json", "--seed"):
        assert option in text


# --- interrupted runs ---


def test_ctrl_c_keeps_finished_results(dvit: Dvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = [cat(tmp_path / f"{name}.jpg", bright=10 * i) for i, name in enumerate(("one", "two", "three"))]
    real, calls = Denoising.__call__, []

    def stop_at_the_second(*arguments: Any, **options: Any) -> Decomposition:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(Denoising, "__call__", stop_at_the_second)
    done = dvit(*photos, "-o", tmp_path / "out")
    assert done.code == 130
    assert len(calls) == 2
    assert listing(tmp_path / "out") == ["one.png", "one.safetensors"]
    assert "interrupted; finished results are kept" in done.err

    monkeypatch.setattr(Denoising, "__call__", real)
    rows = dvit(*photos, "-o", tmp_path / "out", "--json").rows  # the same command resumes
    assert [row["status"] for row in rows] == ["kept", "done", "done"]


@pytest.mark.parametrize("step", ["write_decomposition", "draw_panel"])
def test_ctrl_c_while_writing_leaves_no_partial_file(
    dvit: Dvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def stop_half_way(*arguments: Any, **_options: Any) -> None:
        path = next(argument for argument in arguments if isinstance(argument, Path))
        path.write_bytes(b"ha")
        raise KeyboardInterrupt

    monkeypatch.setattr(*_place_of(step), stop_half_way)
    assert dvit(cat(tmp_path / "one.jpg"), "-o", tmp_path / "out").code == 130
    left = listing(tmp_path / "out")
    assert set(left) <= {"one.png"}  # at most the complete picture
    for name in left:
        with Image.open(tmp_path / "out" / name) as picture:
            picture.load()


def _place_of(step: str) -> tuple[Any, str]:
    return (denoising_vit.maps if step == "draw_panel" else denoising_vit.decomposition.result), step


def test_interrupt_anywhere_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_arguments: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "run", interrupted)
    with pytest.raises(SystemExit) as caught:
        app.main([])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


# --- errors while running ---


@pytest.mark.parametrize("step", ["write_decomposition", "draw_panel"])
def test_full_disk_is_reported_per_photo(
    dvit: Dvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    module, name = _place_of(step)
    real, calls = getattr(module, name), []

    def fail_at_the_first(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            path = next(argument for argument in arguments if isinstance(argument, Path))
            path.write_bytes(b"ha")
            raise OSError(28, "No space left on device")
        real(*arguments, **options)

    monkeypatch.setattr(module, name, fail_at_the_first)
    one, two = cat(tmp_path / "one.jpg"), cat(tmp_path / "two.jpg", bright=20)
    done = dvit(one, two, "-o", tmp_path / "out")
    assert done.code == 1
    assert re.search(rf"skipped: {re.escape(str(one))}: .*No space left on device", done.err)
    left = listing(tmp_path / "out")
    assert "two.safetensors" in left and "two.png" in left
    assert "one.safetensors" not in left
    assert not [name for name in left if name.endswith(".part")]


def test_drawing_error_is_reported_per_photo(dvit: Dvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = denoising_vit.maps.draw_panel, []

    def fail_at_the_first(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("features are not finite")  # documented for draw_panel
        real(*arguments, **options)

    monkeypatch.setattr(denoising_vit.maps, "draw_panel", fail_at_the_first)
    done = dvit(cat(tmp_path / "one.jpg"), cat(tmp_path / "two.jpg", bright=20), "-o", tmp_path / "out")
    assert done.code == 1
    assert "features are not finite" in done.err
    assert "two.safetensors" in listing(tmp_path / "out")


def test_nan_features_are_reported_per_photo(dvit: Dvit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = BackboneSpec.load

    def broken(*arguments: Any, **options: Any) -> Any:
        model = real(*arguments, **options)
        _ = model.fingerprint  # computed before the weights are NaN
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        return model

    monkeypatch.setattr(BackboneSpec, "load", broken)
    photos = [cat(tmp_path / "one.jpg"), cat(tmp_path / "two.jpg", bright=20)]
    done = dvit(*photos, "-o", tmp_path / "out")
    assert done.code == 1
    assert done.out == ""
    for photo in photos:
        assert re.search(rf"skipped: {re.escape(str(photo))}: .*not finite", done.err)
    assert listing(tmp_path / "out") == []
    assert "0 of 2 photos" in done.err


# --- the installed command; test_end_to_end.py runs it on a photo ---


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("dvit")
    environment = os.environ | {"COLUMNS": "200", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [script, *map(str, arguments)], capture_output=True, text=True, encoding="utf-8", env=environment
    )


def test_installed_command_exits_2_for_missing_photos(tmp_path: Path) -> None:
    done = command("denoise", tmp_path / "missing.jpg", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "no such file or folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_table_shows_folders_when_file_names_are_ambiguous(dvit: Dvit, tmp_path: Path) -> None:
    one, two = cat(tmp_path / "a" / "same.jpg"), cat(tmp_path / "b" / "same.jpg", bright=30)
    out = dvit(one, two, "-o", tmp_path / "out").out.replace("\n", "").replace(" ", "")
    assert "same-2.safetensors" in out
    assert "a/same.jpg" in out and "b/same.jpg" in out


def test_os_error_is_reported_with_the_file_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def models() -> int:
        """Raises the error of a full disk."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/sheet.png")

    monkeypatch.setattr("denoising_vit.cli.backbones.models", models)
    assert app.run(["models"]) == 2
    message = "error: out/sheet.png could not be read or written (No space left on device); free disk space"
    assert message in capsys.readouterr().err
