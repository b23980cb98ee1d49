"""`dvit train` on the command line: exit codes, messages and files."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny_distillation
import tiny_fit
import tiny_training as tiny
from command import Dvit, Outcome, in_process
from denoising_vit.denoiser import read_denoiser
from denoising_vit.denoiser.job import TrainJob
from denoising_vit.denoiser.train import Training

pytestmark = pytest.mark.usefixtures("one_thread")

PHOTOS = 6

Train = Callable[..., Outcome]


@pytest.fixture(scope="module", autouse=True)
def blank_panels() -> Iterator[None]:
    with tiny_distillation.blank_panels():
        yield


@pytest.fixture
def dvit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Dvit:
    return in_process(capsys, monkeypatch)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_fit.write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_fit.write_photos(tmp_path_factory.mktemp("photos"), PHOTOS)


@pytest.fixture(scope="module")
def store(one_thread: None, photos: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted") / "store"
    tiny_fit.prepare(photos, folder, tiny_fit.spec_of(weights)).run()
    return folder


@pytest.fixture
def train(dvit: Dvit, weights: Path) -> Train:
    """Runs `dvit train DATA ...` with the tiny model for four steps; later options win."""
    model = ("--backbone", tiny_fit.MODEL, "--weights", str(weights), "--device", "cpu", "--dtype", "float32")
    small = ("--steps", 4, "--batch-size", 2, "--held-out", 2, "--evaluate-every", 2, "--checkpoint-every", 2)
    rest = ("--precision", "float32", "--pairs.keep", 3)
    return lambda data, *more: dvit("train", data, *model, *small, *rest, *more)


FITTING = ("--on-the-fly", "--exact.size", tiny_fit.SIZE, "--exact.views", tiny_fit.VIEWS)


def test_train_from_a_store(train: Train, store: Path, photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    done = train(store, "--photos", photos, "-o", run)
    assert done.code == 0, done.err
    assert done.out == ""
    assert f"4 images to train on, 2 held out; run {run}" in done.err
    assert re.search(
        r"step 2: held-out cosine 0\.\d+ \(raw 0\.\d+\), 1 - cosine \d\.\d+ times that of raw, effective", done.words
    )
    assert re.search(rf"4 of 4 steps done, the best after step [24]: {run}/denoiser.safetensors", done.err)
    assert read_denoiser(run / "denoiser.safetensors").info["images"] == 4
    assert [row["step"] for row in tiny.rows(run, "train")] == [1, 2, 3, 4]
    page = (run / "run.html").read_text("utf-8")
    assert f"page {run}/run.html" in done.err and "4 of 4 steps; best after step" in page and "data:image/png" in page


def test_stop_and_resume(train: Train, store: Path, photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = train(store, "--photos", photos, "-o", run, "--stop-at", 2)
    assert first.code == 0
    assert "2 of 4 steps done (continue with --resume)" in first.err
    again = train(store, "--photos", photos, "-o", run)
    assert again.code == 2
    assert "already has a run; use --resume to continue it" in again.err
    other = train(store, "--photos", photos, "-o", run, "--resume", "--batch-size", 3)
    assert other.code == 2
    assert "cannot resume with other options: options.batch_size was 2, now 3" in other.err
    done = train(store, "--photos", photos, "-o", run, "--resume")
    assert done.code == 0
    assert "4 of 4 steps done," in done.err


def test_ctrl_c_exits_130_and_explains_how_to_resume(
    train: Train, store: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Training, *_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "run", interrupted)
        done = train(store, "--photos", photos, "-o", tmp_path / "run")
    assert done.code == 130
    assert "interrupted; continue with --resume" in done.err
    assert train(store, "--photos", photos, "-o", tmp_path / "run", "--resume").code == 0


def test_photos_on_the_fly(train: Train, photos: Path, tmp_path: Path) -> None:
    done = train(photos, "-o", tmp_path / "run", *FITTING)
    assert done.code == 0, done.err
    assert "4 images to train on, 2 held out" in done.err


def test_unusable_photo_is_reported_and_exits_1(train: Train, photos: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(photos, tmp_path / "photos")
    (damaged / "03.png").write_text("words")
    done = train(damaged, "-o", tmp_path / "run", *FITTING)
    assert done.code == 1
    assert re.search(r"skipped: 03.png: .*not an image file", done.words)
    assert "3 images to train on, 2 held out" in done.err
    assert read_denoiser(tmp_path / "run" / "last.safetensors").info["images"] == 3


class Second:
    """The accelerator of a process that is not the first."""

    is_main_process = False

    def __init__(self, first: Any) -> None:
        self._first = first

    def __getattr__(self, name: str) -> Any:
        return getattr(self._first, name)


def test_only_the_first_process_reports_unusable_photos(
    train: Train, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = shutil.copytree(photos, tmp_path / "photos")
    (damaged / "03.png").write_text("words")
    (damaged / "gone.png").symlink_to(tmp_path / "nothing")
    prepare = TrainJob.prepare

    def second(*args: Any, **more: Any) -> TrainJob:
        job = prepare(*args, **more)
        job.kept.open(create=True)  # as the first process did
        job.accelerator = Second(job.accelerator)
        return job

    monkeypatch.setattr(TrainJob, "prepare", second)
    done = train(damaged, "-o", tmp_path / "run", *FITTING)
    assert (done.code, done.out, done.err) == (0, "", "")


def test_other_files_next_to_the_photos_of_a_store_are_ignored(
    train: Train, store: Path, photos: Path, tmp_path: Path
) -> None:
    more = shutil.copytree(photos, tmp_path / "photos")
    (more / "note.txt").write_text("words")
    (more / "another.png").write_text("words")
    (more / "gone.png").symlink_to(tmp_path / "nothing")
    (more / "others.tar").write_bytes(b"")
    done = train(store, "--photos", more, "-o", tmp_path / "run")
    assert done.code == 0, done.err
    assert "skipped" not in done.err


def test_missing_photo_of_a_list_is_reported_and_exits_1(train: Train, photos: Path, tmp_path: Path) -> None:
    listed = [str(photos / f"{number:02}.png") for number in range(PHOTOS)]
    (tmp_path / "list.txt").write_text("\n".join([*listed, str(photos / "gone.png")]) + "\n")
    done = train(tmp_path / "list.txt", "-o", tmp_path / "run", *FITTING)
    assert done.code == 1
    assert "gone.png" in done.err


def test_fresh_views_of_a_store(train: Train, store: Path, photos: Path, tmp_path: Path) -> None:
    done = train(store, "--photos", photos, "-o", tmp_path / "run", "--pairs.keep", 0)
    assert done.code == 0, done.err


def test_a_store_needs_its_photos(train: Train, store: Path, tmp_path: Path) -> None:
    done = train(store, "-o", tmp_path / "run")
    assert done.code == 2
    assert "is a store of fields; also give its photos with --photos" in done.err


def test_on_the_fly_is_rejected_for_a_store(train: Train, store: Path, photos: Path, tmp_path: Path) -> None:
    done = train(store, "--photos", photos, "-o", tmp_path / "run", "--on-the-fly")
    assert done.code == 2
    assert "is a store and already contains the fields; omit --on-the-fly" in done.err


def test_photos_without_on_the_fly_are_rejected(train: Train, photos: Path, tmp_path: Path) -> None:
    done = train(photos, "-o", tmp_path / "run")
    assert done.code == 2
    assert f"first run dvit fit {photos} -o STORE, or give --on-the-fly" in done.err


def test_photos_given_twice_are_rejected(train: Train, photos: Path, tmp_path: Path) -> None:
    done = train(photos, "--photos", photos, "-o", tmp_path / "run", *FITTING)
    assert done.code == 2
    assert "with --on-the-fly, give the photos as the data" in done.err


def test_fresh_views_on_the_fly_are_rejected(train: Train, photos: Path, tmp_path: Path) -> None:
    done = train(photos, "-o", tmp_path / "run", *FITTING, "--pairs.keep", 0)
    assert done.code == 2
    assert "need the fields of a store: run dvit fit first" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--pairs.sizes", "big"), "sizes must be pixel sizes such as 518 or 364x476"),
        (("--pairs.sizes", "50"), "50"),
        (("--steps", 0), "steps must be at least 1, got 0"),
        (("--held-out", 6), "expected more than 6 images, because 6 are held out"),
        (("--resume",), "no run to resume; start it without --resume"),
        (
            ("--backbone", "vit_small_patch16_224", "--weights", "random"),
            "the store was fitted with vit_tiny_patch16_224",
        ),
    ],
)
def test_wrong_options_exit_2_with_a_reason_and_create_no_folder(
    train: Train, store: Path, photos: Path, tmp_path: Path, more: tuple[object, ...], message: str
) -> None:
    done = train(store, "--photos", photos, "-o", tmp_path / "run", *more)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "run").exists()


def test_missing_photo_of_a_store_exits_2(train: Train, store: Path, photos: Path, tmp_path: Path) -> None:
    fewer = shutil.copytree(photos, tmp_path / "photos")
    (fewer / "02.png").unlink()
    done = train(store, "--photos", fewer, "-o", tmp_path / "run")
    assert done.code == 2
    assert "1 of the store's 6 photos are missing (02.png)" in done.err


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--pairs.keep", 2), "--pairs.keep 3 or more, or --pairs.whole 1"),
        (("--pairs.keep", 0, *FITTING), "--pairs.keep 1 or more with --on-the-fly"),
    ],
)
def test_messages_use_the_actual_option_names(
    train: Train, photos: Path, store: Path, tmp_path: Path, more: tuple[object, ...], named: str
) -> None:
    data = (photos,) if FITTING[0] in more else (store, "--photos", photos)
    done = train(*data, "-o", tmp_path / "run", *more)
    assert done.code == 2
    assert named in done.err
    assert "--keep" not in done.err
