"""Clips: every frame at its time and upright, and damaged frames replaced."""

from __future__ import annotations

import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

import tiny_video as tiny
from denoising_vit.errors import ClipError
from denoising_vit.show.video import films
from denoising_vit.show.video.clips import Clip, Frame
from denoising_vit.show.video.encoding import join
from denoising_vit.show.video.films import open_clip

RATE = Fraction(24)

Turn = Callable[[np.ndarray], np.ndarray]


def opened(path: Path) -> Clip:
    return open_clip(path, RATE)


def all_frames(clip: Clip, **options: Any) -> list[Frame]:
    """In the clip's own size."""
    return list(clip.frames(clip.size, clip.size, **options))


def shows(frame: Frame, number: int) -> bool:
    """Whether a frame is the picture of this number, up to losses of the codec, and no other picture."""
    assert frame.panel is not None
    distance = [np.abs(frame.panel - tiny.picture(other).astype(float)).mean() for other in range(12)]
    return int(np.argmin(distance)) == number and distance[number] < 12


@pytest.fixture
def pictures() -> list[np.ndarray]:
    return [tiny.picture(number) for number in range(8)]


def test_video_frames_are_in_order_with_their_times(tmp_path: Path, pictures: list[np.ndarray]) -> None:
    clip = opened(tiny.film(tmp_path / "a.mp4", pictures, rate=Fraction(30000, 1001)))
    assert (clip.size, clip.count, clip.rate) == (tiny.SIZE, 8, Fraction(30000, 1001))
    frames = all_frames(clip)
    assert [frame.number for frame in frames] == list(range(8))
    assert all(shows(frame, frame.number) for frame in frames)
    assert np.allclose([float(frame.time * clip.time_base) for frame in frames], np.arange(8) * 1001 / 30000)


def test_variable_frame_rate_keeps_its_times(tmp_path: Path, pictures: list[np.ndarray]) -> None:
    times = [0, 40, 100, 400, 410, 900, 1000, 1500]
    clip = opened(tiny.film(tmp_path / "a.mkv", pictures, times=times))
    assert [round(1000 * float(frame.time * clip.time_base)) for frame in all_frames(clip)] == times


def test_every_and_most_select_frames(tmp_path: Path, pictures: list[np.ndarray]) -> None:
    clip = opened(tiny.film(tmp_path / "a.mp4", pictures))
    frames = all_frames(clip, every=3)
    assert [shows(frame, 3 * frame.number) for frame in frames] == [True] * 3
    units = [frame.time * clip.time_base * 25 for frame in frames]
    assert units == [0, 3, 6]
    assert frames[0].duration * clip.time_base * 25 == 3
    assert frames[2].duration * clip.time_base * 25 == 2  # what is left of the clip
    assert [frame.number for frame in all_frames(clip, every=2, most=2)] == [0, 1]


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [("a.mp4", "libx264", "yuv420p"), ("a.avi", "mjpeg", "yuvj420p"), ("a.mov", "png", "rgb24")],
)
def test_damaged_frame_is_replaced_by_the_previous_one(
    tmp_path: Path, pictures: list[np.ndarray], name: str, codec: str, pix_fmt: str
) -> None:
    path = tiny.film(tmp_path / name, pictures, codec=codec, pix_fmt=pix_fmt, options={"g": "1", "bf": "0"})
    tiny.damage(path, 4)
    clip = opened(path)
    frames = all_frames(clip)
    assert [frame.number for frame in frames if frame.lost is not None] == [4]
    assert [shows(frame, 3 if frame.number == 4 else frame.number) for frame in frames] == [True] * 8
    assert [frame.time * clip.time_base * 25 for frame in frames] == list(range(8))


def test_damaged_first_frame_is_replaced_by_the_next_one(tmp_path: Path, pictures: list[np.ndarray]) -> None:
    path = tiny.film(tmp_path / "a.avi", pictures, codec="mjpeg", pix_fmt="yuvj420p")
    tiny.damage(path, 0)
    frames = all_frames(opened(path))
    assert [frame.lost is not None for frame in frames] == [True] + [False] * 7
    assert [frame.number for frame in frames] == list(range(8))
    assert shows(frames[0], 1)


def test_damaged_images_in_a_folder_are_replaced(tmp_path: Path, pictures: list[np.ndarray]) -> None:
    path = tiny.folder(tmp_path / "frames", pictures)
    for number in (0, 5):
        (path / f"{number}.png").write_bytes(b"no image")
    frames = all_frames(opened(path))
    assert [frame.number for frame in frames if frame.lost is not None] == [0, 5]
    assert shows(frames[0], 1) and shows(frames[5], 4) and shows(frames[6], 6)
    assert "0.png" in str(frames[0].lost)


def test_replacement_frame_is_available_when_resuming(tmp_path: Path, pictures: list[np.ndarray]) -> None:
    path = tiny.folder(tmp_path / "frames", pictures)
    (path / "4.png").write_bytes(b"no image")
    clip = opened(path)
    frames = list(clip.frames(clip.size, clip.size, wanted=lambda number: number >= 4))
    assert [frame.number for frame in frames] == list(range(8))
    assert all(frame.shown is None for frame in frames[:3])
    assert shows(frames[4], 3)


def test_frames_are_sorted_by_the_number_in_their_name(tmp_path: Path) -> None:
    clip = opened(tiny.folder(tmp_path / "frames", [tiny.picture(number) for number in range(12)]))
    assert clip.rate == 24
    assert all(shows(frame, frame.number) for frame in all_frames(clip))


def test_frames_of_other_sizes_keep_their_aspect(tmp_path: Path, pictures: list[np.ndarray]) -> None:
    path = tiny.folder(tmp_path / "frames", pictures[:2])
    Image.new("RGB", (40, 48), "white").save(path / "2.png")
    Image.fromarray(pictures[3]).resize((160, 96), Image.Resampling.NEAREST).save(path / "3.png")
    frames = all_frames(opened(path))
    assert [frame.boxed for frame in frames] == [False, False, True, False]
    panel = frames[2].panel
    assert panel is not None
    assert panel.shape == (48, 80, 3)
    assert (panel[:, 20:60] == 255).all()
    assert (panel[:, :20] == 0).all() and (panel[:, 60:] == 0).all()
    assert shows(frames[3], 3)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((0, 1, -1, 0), lambda pixels: np.rot90(pixels, -1)),  # a phone held upright
        ((0, -1, 1, 0), lambda pixels: np.rot90(pixels, 1)),
        ((-1, 0, 0, -1), lambda pixels: pixels[::-1, ::-1]),
        ((-1, 0, 0, 1), lambda pixels: pixels[:, ::-1]),
    ],
)
def test_orientation_is_applied(tmp_path: Path, matrix: tuple[int, int, int, int], expected: Turn) -> None:
    path = tiny.film(tmp_path / "a.mp4", [tiny.picture(0)] * 2)
    tiny.turn(path, matrix)
    clip = opened(path)
    right = expected(tiny.picture(0))
    assert clip.size == right.shape[:2]
    for frame in all_frames(clip):
        assert frame.panel is not None
        assert np.abs(frame.panel - right.astype(float)).mean() < 12


def test_alpha_is_composited_over_white(tmp_path: Path) -> None:
    pixels = np.zeros((*tiny.SIZE, 4), np.uint8)
    pixels[:, :40] = 200, 0, 0, 255
    for name, codec, pix_fmt in (("a.mov", "qtrle", "argb"), ("b.mov", "png", "rgba"), ("c.mkv", "ffv1", "yuva420p")):
        path = tiny.film(tmp_path / name, [pixels] * 2, codec=codec, pix_fmt=pix_fmt)
        frame = all_frames(opened(path))[0]
        assert frame.panel is not None
        assert np.abs(frame.panel[:, :38] - np.array([200.0, 0, 0])).max() < 12, codec
        assert (frame.panel[:, 42:] > 250).all(), codec


def test_frames_are_resized_while_decoding(tmp_path: Path) -> None:
    clip = opened(tiny.film(tmp_path / "a.mp4", [np.full((1080, 1920, 3), 99, np.uint8)] * 2))
    frame = next(clip.frames((48, 80), (32, 64)))
    assert frame.shown is not None and frame.panel is not None
    assert frame.shown.shape == (48, 80, 3)
    assert frame.panel.shape == (32, 64, 3)


def refused(path: Path) -> str:
    with pytest.raises(ClipError) as caught:
        list(opened(path).frames((16, 16), (16, 16)))
    return str(caught.value)


def test_invalid_clips_are_rejected_with_a_reason(tmp_path: Path) -> None:
    text, empty, nothing = tmp_path / "text.mp4", tmp_path / "empty.mp4", tmp_path / "nothing"
    text.write_text("not a video\n" * 100)
    empty.touch()
    nothing.mkdir()
    assert "not a video file that can be read" in refused(text)
    assert "expected a video such as MP4" in refused(text)
    assert "the file is empty (0 bytes)" in refused(empty)
    assert "no frames in this folder (looked for" in refused(nothing)
    (nothing / "below").mkdir()
    assert "give one that has frames" in refused(nothing)
    assert "no such file or folder" in refused(tmp_path / "absent.mp4")


def test_audio_only_and_empty_videos_are_rejected(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.m4a"), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    assert "expected a video stream, found audio" in refused(tmp_path / "sound.m4a")
    with av.open(str(tmp_path / "none.avi"), "w") as container:
        video = container.add_stream("mjpeg", rate=25)
        video.width, video.height, video.pix_fmt = 32, 32, "yuvj420p"
        container.start_encoding()
    assert "the video has no frames" in refused(tmp_path / "none.avi")


def test_clip_with_all_frames_damaged_is_rejected(tmp_path: Path) -> None:
    path = tiny.folder(tmp_path / "frames", [tiny.picture(0)] * 2)
    for file in path.iterdir():
        file.write_bytes(b"no image")
    assert "none of its 2 images can be read" in refused(path)
    film = tiny.film(tmp_path / "a.avi", [tiny.picture(0)] * 2, codec="mjpeg", pix_fmt="yuvj420p")
    for number in range(2):
        tiny.damage(film, number)
    assert "none of its 2 frames can be decoded" in refused(film)


def test_truncated_video_is_read_up_to_the_cut(tmp_path: Path, pictures: list[np.ndarray]) -> None:
    path = tiny.film(tmp_path / "a.mp4", pictures, options={"bf": "0"})
    join([path], tmp_path / "fast.mp4", Fraction(8, 25), "")  # its index comes before the frames
    content = (tmp_path / "fast.mp4").read_bytes()
    (tmp_path / "fast.mp4").write_bytes(content[: len(content) * 2 // 3])
    clip = opened(tmp_path / "fast.mp4")
    frames = all_frames(clip)
    assert 1 <= len(frames) < 8
    assert shows(frames[0], 0)
    assert clip.missing or any(frame.lost for frame in frames)


def test_frames_that_are_too_large_are_refused(
    tmp_path: Path, pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.film(tmp_path / "a.mp4", pictures)
    monkeypatch.setattr(films, "MAX_PIXELS", 80 * 48 - 1)
    assert "frames of 80 x 48 pixels exceed the limit of 3,839" in refused(path)


def test_without_pyav_the_extra_is_named(
    tmp_path: Path, pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.film(tmp_path / "a.mp4", pictures)
    monkeypatch.setitem(sys.modules, "av", None)
    assert "install the extra `video`" in refused(path)
