"""`dvit video`: exit codes, messages, written files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tiny_export
import tiny_video as tiny
from command import Dvit, Outcome, in_process
from denoising_vit.denoiser import write_denoiser
from denoising_vit.show.video import rendering

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export.distilled(tmp_path_factory.mktemp("weights") / "plain.safetensors", None)


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    return tiny.folder(tmp_path / "clip", [tiny.picture(number) for number in range(5)])


@pytest.fixture
def video(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: Path) -> Dvit:
    """Runs `dvit video INPUT ... -o OUT ...` with a tiny model; later options override earlier ones."""
    dvit = in_process(capsys, monkeypatch)
    model = ("--backbone", tiny_export.MODEL, "--weights", weights, "--device", "cpu", "--dtype", "float32")
    small = ("--features", "raw", "--size", 80, "--panel-size", 80, "--part-frames", 2)

    def call(*arguments: object) -> Outcome:
        given = [*arguments]
        inputs = given[: next((n for n, word in enumerate(given) if str(word).startswith("-")), len(given))]
        return dvit("video", *inputs, "-o", tmp_path / "out", *model, *small, *given[len(inputs) :])

    return call


def test_bad_clip_is_skipped_and_the_others_are_rendered(
    video: Dvit, frames: Path, tmp_path: Path, weights: Path
) -> None:
    backbone = tiny_export.backbone(weights=str(weights))
    write_denoiser(tiny_export.denoiser(backbone), tmp_path / "denoiser.safetensors")
    film = tiny.film(tmp_path / "film.mp4", [tiny.picture(number) for number in range(3)])
    bad = tmp_path / "text.mp4"
    bad.write_text("not a video\n" * 9)
    options = ("--features", "raw,denoiser", "--denoiser", tmp_path / "denoiser.safetensors", "--json", "--frames")
    done = video(bad, frames, film, *options)
    assert done.code == 1, done.err
    assert [(row["status"], row["frames"]) for row in done.rows] == [("failed", None), ("done", 5), ("done", 3)]
    assert f"skipped: {bad}: not a video file that can be read" in done.err
    assert f"2 of 3 videos done, 1 skipped; results in {tmp_path / 'out'}" in done.err
    assert len(tiny.decoded(tmp_path / "out" / "clip.mp4")) == 5
    assert len(list((tmp_path / "out" / "film").glob("*.png"))) == 3
    again = video(frames, film, *options)
    assert again.code == 0
    assert [row["status"] for row in again.rows] == ["kept", "kept"]


def test_clips_with_the_same_name_get_different_outputs(video: Dvit, frames: Path, tmp_path: Path) -> None:
    other = tiny.folder(tmp_path / "else" / "clip", [tiny.picture(9)] * 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "clip.mp4").write_bytes(b"mine")
    for _ in range(2):  # a repeated run uses the same names
        done = video(frames, other, "--json")
        assert done.code == 0, done.err
        assert [Path(row["output"]).name for row in done.rows] == ["clip-2.mp4", "clip-3.mp4"]
    assert (tmp_path / "out" / "clip.mp4").read_bytes() == b"mine"


def test_ctrl_c_exits_130_and_the_same_command_resumes(
    video: Dvit, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = rendering._Run._drawn

    def interrupted(self: rendering._Run, item: rendering.Frame, *rest: object) -> np.ndarray:
        if item.number == 3:
            raise KeyboardInterrupt
        return drawn(self, item, *rest)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(rendering._Run, "_drawn", interrupted)
        stopped = video(frames)
    assert stopped.code == 130
    assert "interrupted; finished parts are kept, run the command again to resume" in stopped.err
    assert not (tmp_path / "out" / "clip.mp4").exists()
    other = video(frames, "--panels", "pca")
    assert other.code == 1
    assert "panels image,pca, now pca); use the same settings to resume it, or start over with --overwrite" in other.err
    done = video(frames)
    assert done.code == 0, done.err
    assert "2 from an earlier run" in done.out
    assert len(tiny.decoded(tmp_path / "out" / "clip.mp4")) == 5


def test_result_of_other_settings_is_kept_with_a_note(video: Dvit, frames: Path) -> None:
    assert video(frames).code == 0
    kept = video(frames, "--every", 2)
    assert kept.code == 0
    assert "kept; made with other settings (every 1, now 2); use --overwrite to redo it" in kept.words
    assert "kept" not in video(frames, "--every", 2, "--overwrite").out


def test_stride_size_and_max_frames_are_applied(video: Dvit, frames: Path) -> None:
    done = video(frames, "--stride", 8, "--size", 48, "--side", "short", "--max-frames", 1, "--json")
    assert done.code == 0, done.err
    assert done.rows[0]["frames"] == 1
    assert "stride 8" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--panels", "dataset-pca"), "needs a saved palette of a data set; give --palette FILE"),
        (("--features", "new"), "unknown features: 'new'; choose from raw"),
        (("--features", "denoiser"), "no denoiser for vit_tiny"),
        (("--features", "distilled"), "--distilled"),
        (("--every", "0"), "every must be at least 1"),
    ],
    ids=str,
)
def test_wrong_usage_exits_2_with_a_message(video: Dvit, frames: Path, options: tuple[str, ...], message: str) -> None:
    failed = video(frames, *options)
    assert failed.code == 2
    assert message in failed.words


def test_missing_input_and_unwritable_output_exit_2(video: Dvit, frames: Path, tmp_path: Path) -> None:
    assert video().code == 2
    (tmp_path / "out").write_text("a file")
    failed = video(frames)
    assert failed.code == 2
    assert f"cannot write to {tmp_path / 'out'}" in failed.err
    assert "choose another folder" in failed.err


def test_help_lists_panels_and_sizes(video: Dvit) -> None:
    shown = video("--help")
    assert shown.code == 0
    for word in ("dataset-pca", "about 518", "exact (stage 1", "--stride", "foreground-pca"):
        assert word in shown.words
