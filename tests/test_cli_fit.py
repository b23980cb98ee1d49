"""`dvit fit` and `dvit store`: exit codes, messages, JSON lines, repeated runs."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import tiny_fit as tiny
from command import Dvit, Outcome, in_process
from denoising_vit.backbones.timm_vit import TimmBackbone
from denoising_vit.cli import app
from denoising_vit.decomposition.stage_one import StageOne
from denoising_vit.fit.job import FitJob
from denoising_vit.store import FeatureStore, ShardWriter, layout

pytestmark = pytest.mark.usefixtures("one_thread")

PHOTOS = 7


@pytest.fixture
def dvit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dvit:
    """Runs `dvit ...` in this process; an exit of the parser also becomes an exit code."""
    return in_process(capsys, monkeypatch)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_photos(tmp_path_factory.mktemp("photos"), PHOTOS)


Fit = Callable[..., Outcome]


@pytest.fixture
def fit(dvit: Dvit, weights: Path) -> Fit:
    """Runs `dvit fit DATA -o STORE` with the tiny model; later options override earlier ones."""
    return lambda data, store, *more: dvit(*tiny.command(Path(data), Path(store), weights), *more)


@pytest.fixture(scope="module")
def finished(one_thread: None, photos: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of all photos; copy it before changing it."""
    folder = tmp_path_factory.mktemp("finished") / "store"
    tiny.prepare(photos, folder, tiny.spec_of(weights)).run()
    return folder


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished store."""
    return Path(shutil.copytree(finished, tmp_path / "store"))


@pytest.fixture
def no_fitting(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function that forbids forward passes at the fitted size once it is called."""
    forward = TimmBackbone.forward

    def refuse(self: TimmBackbone, image: Tensor) -> Tensor:
        assert tuple(image.shape[2:]) != (tiny.SIZE, tiny.SIZE), "this must not be computed again"
        return forward(self, image)

    return lambda: monkeypatch.setattr(TimmBackbone, "forward", refuse)


# --- fit: success ---


def test_success_writes_a_complete_store_and_reports_on_stderr(
    fit: Fit, photos: Path, finished: Path, tmp_path: Path
) -> None:
    done = fit(photos, tmp_path / "new" / "store")
    assert done.code == 0, done.err
    assert done.out == ""
    lines = done.err.splitlines()
    assert lines[0].startswith(f"{PHOTOS} photos, {PHOTOS} to do: {PHOTOS * tiny.PASSES} forward passes, about ")
    assert "free)" in lines[0]
    assert tiny.MODEL in lines[1] and str(tmp_path / "new" / "store") in lines[1]
    assert lines[-1].startswith(f"{PHOTOS} of {PHOTOS} photos in {tmp_path / 'new' / 'store'} at ")
    assert lines[-1].endswith("photos/s")
    assert tiny.contents(tmp_path / "new" / "store") == tiny.contents(finished)


def test_json_prints_only_one_line_per_photo_to_stdout(fit: Fit, photos: Path, tmp_path: Path) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    (data / "02.png").write_text("words")
    done = fit(data, tmp_path / "store", "--json")
    assert done.code == 1
    assert [row["image"] for row in done.rows] == [f"{number:02}.png" for number in range(PHOTOS)]
    (failed,) = [row for row in done.rows if row["status"] != "done"]
    assert (failed["image"], failed["status"]) == ("02.png", "failed")
    assert "not an image file" in failed["note"]


def test_repeated_command_does_nothing(fit: Fit, photos: Path, tmp_path: Path, no_fitting: Callable[[], None]) -> None:
    assert fit(photos, tmp_path / "store").code == 0
    before = tiny.contents(tmp_path / "store")
    no_fitting()
    again = fit(photos, tmp_path / "store", "--json")
    assert again.code == 0
    assert again.out == ""
    assert f"{PHOTOS} photos, {PHOTOS} already done, 0 to do" in again.err
    assert tiny.contents(tmp_path / "store") == before


def test_list_with_blank_lines_and_nested_folders_work(fit: Fit, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"# some of them\n\n{photos / '03.png'}\n\n{photos / '01.png'}\n")
    done = fit(tmp_path / "list.txt", tmp_path / "listed", "--json")
    assert done.code == 0
    assert [row["image"] for row in done.rows] == [str(photos / "03.png"), str(photos / "01.png")]
    shutil.copytree(photos, tmp_path / "tree" / "a")
    tiny.write_photos(tmp_path / "tree" / "b", 1)
    done = fit(tmp_path / "tree", tmp_path / "store", "--json")
    assert done.code == 0
    assert [row["image"] for row in done.rows][-2:] == ["a/06.png", "b/00.png"]


# --- fit: photos that cannot be used ---


def test_skipped_photos_are_reported_and_exit_1_each_time(
    fit: Fit, photos: Path, tmp_path: Path, no_fitting: Callable[[], None]
) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    (data / "02.png").write_text("words")
    Image.new("RGB", (5, 90)).save(data / "04.png")
    first = fit(data, tmp_path / "store")
    no_fitting()
    second = fit(data, tmp_path / "store")
    for done in (first, second):
        assert done.code == 1
        skipped = [line for line in done.err.splitlines() if line.startswith("skipped: ")]
        assert len(skipped) == 2
        assert skipped[0].startswith("skipped: 02.png: not an image file")
        assert skipped[1].startswith("skipped: 04.png: 5 x 90 pixels are less than one patch")
        last = done.err.splitlines()[-1]
        assert last.startswith(f"{PHOTOS - 2} of {PHOTOS} photos in ") and ", 2 skipped" in last
    assert f"{PHOTOS - 2} already done, 2 already skipped, 0 to do" in second.err
    tiny.assert_whole(tmp_path / "store", failed=2)


def test_duplicate_and_missing_photos_of_a_list_exit_1(fit: Fit, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{photos / '01.png'}\n{photos / '01.png'}\n{photos / 'missing.png'}\n")
    for _ in range(2):
        done = fit(tmp_path / "list.txt", tmp_path / "store")
        assert done.code == 1
        assert f"skipped: {photos / '01.png'}: line 2: a duplicate of line 1" in done.err
        assert f"skipped: {photos / 'missing.png'}: line 3: no such file" in done.err
        assert "1 of 1 photos in" in done.err


def test_photo_name_with_markup_is_printed_unchanged(fit: Fit, tmp_path: Path) -> None:
    data = tiny.write_photos(tmp_path / "data", 2)
    (data / "[bold]x.png").write_text("words")
    done = fit(data, tmp_path / "store")
    assert done.code == 1
    assert "skipped: [bold]x.png: not an image file" in done.err


def test_store_name_with_markup_is_printed_unchanged(fit: Fit, photos: Path, tmp_path: Path) -> None:
    done = fit(photos, tmp_path / "[red]store")
    assert done.code == 0
    assert f"{PHOTOS} of {PHOTOS} photos in {tmp_path / '[red]store'} at " in done.err


def test_photo_is_named_even_if_the_reason_contains_its_name(fit: Fit, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "the").touch()
    (tmp_path / "list.txt").write_text(f"the\n{photos / '01.png'}\n")
    done = fit(tmp_path / "list.txt", tmp_path / "store")
    assert done.code == 1
    assert "skipped: the: the file is empty (0 bytes)" in done.err


def test_strict_stops_at_the_first_failure(fit: Fit, tmp_path: Path) -> None:
    data = tiny.write_photos(tmp_path / "data", 20)
    (data / "02.png").write_text("words")
    done = fit(data, tmp_path / "store", "--strict", "--batch-size", tiny.PASSES)
    assert done.code == 2
    assert done.out == ""
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "not an image file" in line
    assert {0, 1} <= FeatureStore.open(tmp_path / "store").done()
    assert len(FeatureStore.open(tmp_path / "store").done()) < 15


# --- fit: rejected ---


def refused(done: Outcome, *parts: object) -> None:
    """Checks for exit code 2, empty standard output, and one error line that contains all parts."""
    assert done.code == 2, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    for part in parts:
        assert str(part) in line


def test_store_with_other_views_is_rejected(fit: Fit, photos: Path, finished: Path) -> None:
    before = tiny.contents(finished)
    refused(fit(photos, finished, "--views", "9"), "option views: the store has 8, this run has 9", finished)
    assert tiny.contents(finished) == before


def test_store_with_other_weights_is_rejected(fit: Fit, photos: Path, finished: Path) -> None:
    refused(fit(photos, finished, "--weights", "random"), "weights: the store has", "this run has random")


def test_folder_with_other_files_is_rejected(fit: Fit, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    refused(fit(photos, tmp_path), "expected an empty or new folder", "diary.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]


def test_a_store_of_a_newer_version_is_refused(fit: Fit, photos: Path, store: Path) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    refused(fit(photos, store), "expected a store of version 2 or lower, got 99", "upgrade")


def test_input_without_photos_is_rejected(fit: Fit, tmp_path: Path) -> None:
    refused(fit(tmp_path / "missing", tmp_path / "store"), tmp_path / "missing", "no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(fit(tmp_path / "empty", tmp_path / "store"), tmp_path / "empty", "found none")
    (tmp_path / "blank.txt").write_text("\n# nothing\n\n")
    refused(fit(tmp_path / "blank.txt", tmp_path / "store"), "blank.txt", "found none")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "2"], "workers applies to engine 'ray' only"),
        (["--ray-address", "auto"], "ray_address applies to engine 'ray' only"),
        (["--decoders", "0"], "decoders must be at least 1, got 0"),
        (["--images-per-shard", "0"], "images_per_shard must be at least 1, got 0"),
        (["--method", "neural-field"], "exact method for data sets, got 'neural-field'"),
        (["--size", "50"], "50"),
        (["--views", "0"], "views must be at least 1, got 0"),
        (["--device", "cpu,nonsense"], "nonsense"),
        (["--engine", "ray", "--device", "cpu,cpu"], "engine 'ray' expects one device"),
        (["--weights", "missing.safetensors"], "missing.safetensors"),
    ],
)
def test_wrong_options_are_rejected_before_a_store_is_created(
    fit: Fit, photos: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    refused(fit(photos, tmp_path / "store", *options), message)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("arguments", [["fit"], ["fit", "photos"], ["fit", "photos", "-o", "s", "--grid", "fine"]])
def test_parser_errors_exit_2(dvit: Dvit, arguments: list[str]) -> None:
    done = dvit(*arguments)
    assert done.code == 2
    assert done.out == ""


def test_too_little_disk_space_is_rejected(
    fit: Fit, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # pyright: ignore
    done = fit(photos, tmp_path / "store")
    refused(done, "7 photos, 7 to do: 63 forward passes", "138.2 kB (1.0 kB free)", "--grid patch")


def test_missing_ray_names_the_extra_to_install(
    fit: Fit, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(fit(photos, tmp_path / "store", "--engine", "ray"), "install the extra `ray`")


# --- fit: stopped ---


def after_puts(monkeypatch: pytest.MonkeyPatch, count: int, act: Callable[[], None]) -> None:
    """Calls `act` before each write of a photo after the first `count`."""
    put, seen = ShardWriter.put, 0

    def counting(self: ShardWriter, index: int, field: Tensor, record: dict[str, Any] | None = None) -> None:
        nonlocal seen
        seen += 1
        if seen > count:
            act()
        put(self, index, field, record)

    monkeypatch.setattr(ShardWriter, "put", counting)


def test_ctrl_c_exits_130_and_the_same_command_resumes(
    fit: Fit, photos: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as during:
        during.setattr(StageOne, "run", interrupted_after(2, StageOne.run))
        done = fit(photos, tmp_path / "store", "--batch-size", tiny.PASSES)
    assert done.code == 130
    assert done.out == ""
    assert "interrupted; finished photos are kept, run the command again to resume" in done.err
    assert len(FeatureStore.open(tmp_path / "store").done()) == 2
    again = fit(photos, tmp_path / "store", "--batch-size", tiny.PASSES)
    assert again.code == 0
    assert "2 already done, 5 to do" in again.err
    assert tiny.fields(tmp_path / "store") == tiny.fields(finished)


def interrupted_after(count: int, run: Callable[..., Any]) -> Callable[..., Any]:
    """Stage 1 that is interrupted by Ctrl-C after `count` photos."""

    def stopping(self: StageOne, items: Any) -> Any:
        for number, result in enumerate(run(self, items)):
            if number == count:
                signal.raise_signal(signal.SIGINT)
            yield result

    return stopping


def test_full_disk_exits_2_and_the_same_command_resumes(
    fit: Fit, photos: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as during:
        after_puts(during, 4, full)
        done = fit(photos, tmp_path / "store")
    refused(done, f"cannot write to {tmp_path / 'store'} (No space left on device)", "to resume")
    assert len(FeatureStore.open(tmp_path / "store").done()) == 4
    assert fit(photos, tmp_path / "store").code == 0
    assert tiny.contents(tmp_path / "store") == tiny.contents(finished)


def test_shard_of_another_writer_exits_2_and_names_its_process(
    fit: Fit, photos: Path, weights: Path, tmp_path: Path
) -> None:
    job: FitJob = tiny.prepare(photos, tmp_path / "store", tiny.spec_of(weights))
    with job.store.writer(0):
        refused(fit(photos, tmp_path / "store"), f"being written by process {os.getpid()} on ")
    assert fit(photos, tmp_path / "store").code == 0


def test_broken_pipe_is_not_reported_as_a_write_error(
    photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `dvit fit ... --json | head`: main() ends quietly on a BrokenPipeError."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        app.run([*tiny.command(photos, tmp_path / "store", weights), "--json"])


# --- help ---


def test_help_lists_verbs_and_options(dvit: Dvit) -> None:
    top = dvit("--help")
    assert top.code == 0
    assert "fit" in top.out and "store" in top.out
    fit_help = dvit("fit", "--help")
    assert fit_help.code == 0
    for part in ("DATA", "STORE", "--engine", "--strict", "--grid", "--ray-address", "--json"):
        assert part in fit_help.out
    store_help = dvit("store", "--help")
    assert store_help.code == 0
    for verb in ("info", "verify", "export"):
        assert verb in store_help.out
        verb_help = dvit("store", verb, "--help")
        assert verb_help.code == 0
        assert "STORE" in verb_help.out


# --- store info ---


def test_info_prints_a_summary_of_the_store(dvit: Dvit, finished: Path, weights: Path) -> None:
    done = dvit("store", "info", finished)
    assert done.code == 0
    assert f"{PHOTOS} of {PHOTOS} done, 0 failed" in done.out
    assert "3 of 3 sealed, 0 photos staged" in done.out
    assert "6 x 6 nodes, 192 channels, float16" in done.out
    assert tiny.MODEL in done.out
    assert "8 of 48 x 48 pixels, seed 0" in done.out


def test_info_as_json_has_the_manifest(dvit: Dvit, finished: Path) -> None:
    done = dvit("store", "info", finished, "--json")
    assert done.code == 0
    assert done.err == ""
    (found,) = done.rows
    assert (found["images"], found["done"], found["failed"], found["sealed"]) == (PHOTOS, PHOTOS, 0, 3)
    assert found["manifest"]["options"]["views"] == 8
    assert found["bytes"] > PHOTOS * 6 * 6 * 192 * 2


# --- store verify ---


def test_verify_finds_no_problems_in_an_intact_store(dvit: Dvit, finished: Path) -> None:
    done = dvit("store", "verify", finished)
    assert (done.code, done.out) == (0, "")
    assert f"{PHOTOS} photos read, 0 problems found in {finished}" in done.err


def damage(store: Path, shard: int = 1) -> None:
    """Flips one bit in the middle of a shard."""
    path = store / layout.FIELD / layout.shard_key(shard).removeprefix(f"{layout.FIELD}/")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_verify_reports_a_damaged_photo_and_exits_1(dvit: Dvit, store: Path) -> None:
    damage(store)
    done = dvit("store", "verify", store)
    assert (done.code, done.out) == (1, "")
    (line,) = [line for line in done.err.splitlines() if line.startswith("damaged: ")]
    assert line.startswith("damaged: 04.png: its chunk in shard 1 is damaged")
    assert "1 problem found" in done.err


def test_verify_reports_a_missing_shard(dvit: Dvit, store: Path) -> None:
    (store / layout.shard_key(0)).unlink()
    done = dvit("store", "verify", store)
    assert done.code == 1
    for name in ("00.png", "01.png", "02.png"):
        assert f"damaged: {name}: " in done.err


def test_verify_finds_no_problems_in_an_unfinished_store(
    fit: Fit, dvit: Dvit, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as during:
        during.setattr(StageOne, "run", interrupted_after(2, StageOne.run))
        fit(photos, tmp_path / "store", "--batch-size", tiny.PASSES)
    done = dvit("store", "verify", tmp_path / "store")
    assert done.code == 0
    assert "2 photos read, 0 problems found" in done.err


# --- store export ---


def test_export_writes_one_file_per_photo(dvit: Dvit, finished: Path, tmp_path: Path) -> None:
    store = FeatureStore.open(finished)
    done = dvit("store", "export", finished, "-o", tmp_path / "npy")
    assert (done.code, done.out) == (0, "")
    assert f"{PHOTOS} files in {tmp_path / 'npy'}" in done.err
    files = sorted((tmp_path / "npy").iterdir())
    assert [path.name for path in files] == [f"{number:02}.png.npy" for number in range(PHOTOS)]
    for index, path in enumerate(files):
        assert np.load(path).tobytes() == store.read(index)[0].tobytes()
    assert dvit("store", "export", finished, "-o", tmp_path / "st", "--kind", "safetensors").code == 0
    loaded = load_file(tmp_path / "st" / "03.png.safetensors")
    assert loaded["field"].numpy().tobytes() == store.read(3)[0].tobytes()


def test_export_of_a_damaged_store_names_the_photo(dvit: Dvit, store: Path, tmp_path: Path) -> None:
    damage(store)
    done = dvit("store", "export", store, "-o", tmp_path / "out")
    refused(done, "04.png in shard 1 cannot be read", "dvit store verify")
    assert not (tmp_path / "out" / "04.png.npy").exists()


def test_export_to_an_existing_file_is_rejected(dvit: Dvit, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    refused(dvit("store", "export", finished, "-o", tmp_path / "taken"), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


# --- store: not a store ---


@pytest.mark.parametrize("verb", ["info", "verify", "export"])
def test_path_without_a_store_is_rejected(dvit: Dvit, photos: Path, tmp_path: Path, verb: str) -> None:
    more = ["-o", tmp_path / "out"] if verb == "export" else []
    refused(dvit("store", verb, photos, *more), f"{photos}: not a feature store", "dvit fit DATA -o STORE")
    refused(dvit("store", verb, tmp_path / "missing", *more), "no feature store found")
    refused(dvit("store", verb, photos / "00.png", *more), "no feature store found")
    assert not (tmp_path / "missing").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["info", "verify"])
def test_a_damaged_manifest_is_refused(dvit: Dvit, store: Path, verb: str) -> None:
    (store / "manifest.json").write_text('{"format": ')
    refused(dvit("store", verb, store), "damaged manifest")


def test_reading_verbs_write_nothing(dvit: Dvit, store: Path, tmp_path: Path) -> None:
    def stamps() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in store.rglob("*")}

    before = stamps()
    dvit("store", "info", store)
    dvit("store", "verify", store)
    dvit("store", "export", store, "-o", tmp_path / "out")
    assert stamps() == before
