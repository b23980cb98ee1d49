"""Rendered videos: stable colours, complete frames and resumed runs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tiny_artifact
import tiny_denoiser
import tiny_video as tiny
from denoising_vit import Backbone, load_backbone
from denoising_vit.denoise import denoise_image
from denoising_vit.errors import ClipError, DenoisingVitError, FormatError, OutputError, PlanError
from denoising_vit.extractors import Cleaners
from denoising_vit.maps import Palette, write_palette
from denoising_vit.show.options import PANELS, VideoOptions
from denoising_vit.show.video import rendering
from denoising_vit.show.video.frames import GAP, HEADING, FrameFeatures
from denoising_vit.show.video.rendering import RenderedVideo, render_video

pytestmark = pytest.mark.usefixtures("one_thread")

Render = Callable[..., RenderedVideo]


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """A folder of ten frames."""
    return tiny.folder(tmp_path / "clip", [tiny.picture(number) for number in range(10)])


@pytest.fixture
def render(tmp_path: Path) -> Render:
    """Renders a clip with the planted backbone to OUT.mp4 and OUT/*.png."""

    def call(clip: Path, out: str = "out", backbone: Backbone | None = None, **options: Any) -> RenderedVideo:
        given = dataclasses.replace(tiny.SMALL, frames=True)
        return render_video(backbone or tiny.backbone(), clip, tmp_path / f"{out}.mp4", options=given, **options)

    return call


def pngs(done: RenderedVideo) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(done.path.with_suffix("").iterdir())]


def test_every_frame_is_rendered_in_order(render: Render, frames: Path) -> None:
    done = render(frames)
    assert (done.status, done.frames, done.resumed, done.notes) == ("done", 10, 0, ())
    sheets = pngs(done)
    assert len(sheets) == 10
    for number, sheet in enumerate(sheets):
        image = sheet[GAP + HEADING :][: tiny.SIZE[0], GAP : GAP + tiny.SIZE[1]]
        assert (image == tiny.picture(number)).mean() > 0.99, number
    for sheet, frame in zip(sheets, tiny.decoded(done.path), strict=True):
        assert np.abs(sheet - frame.astype(float)).mean() < 6  # the file has the colours that were drawn
    times, length = tiny.seconds(done.path)
    assert np.allclose(times, np.arange(10) / 24, atol=1e-4)
    assert length == pytest.approx(10 / 24, abs=1e-4)
    assert not list(done.path.parent.glob(".*"))  # parts are removed


def test_file_is_streamable_h264_with_yuv420p(render: Render, frames: Path) -> None:
    import av

    done = render(frames)
    content = done.path.read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")
    with av.open(str(done.path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.width % 2 == stream.height % 2 == 0
        assert stream.average_rate == 24


def test_variable_frame_rate_keeps_times_and_length(render: Render, tmp_path: Path) -> None:
    times = [0, 40, 100, 400, 410, 900, 1000]
    pictures = [tiny.picture(number) for number in range(7)]
    done = render(tiny.film(tmp_path / "a.mkv", pictures, times=times))
    found, length = tiny.seconds(done.path)
    assert np.allclose(found, np.array(times) / 1000, atol=1e-3)
    assert 1.0 < length < 1.3
    assert len(tiny.decoded(done.path)) == 7


def test_still_clip_gives_identical_frames(render: Render, tmp_path: Path) -> None:
    clip = tiny.folder(tmp_path / "still", [tiny.picture(0)] * 11)
    # 11 frames in batches of 3: frames that the colours are fitted to and others, in full and partial batches.
    sheets = pngs(render(clip, batch_size=3, features="raw,exact", views=6, panels="image,pca,norm"))
    assert len(sheets) == 11
    for sheet in sheets[1:]:
        assert np.array_equal(sheet, sheets[0])


def test_one_basis_for_all_frames_and_features(render: Render, frames: Path, tmp_path: Path) -> None:
    backbone = tiny.backbone()
    denoiser = tiny_denoiser.write(tmp_path / "d", tiny_denoiser.denoiser(backbone), "d.safetensors")
    cleaners = Cleaners(denoiser=str(denoiser))
    both: dict[str, Any] = {"features": "raw,denoiser", "panels": "pca", "basis_frames": 99, "cleaners": cleaners}
    done = render(frames, backbone=backbone, **both)
    maps: list[Tensor] = []
    clean = cleaners.extractor("denoiser", backbone)[0]
    with torch.no_grad():
        for number in range(10):
            pixels = torch.from_numpy(tiny.picture(number)).permute(2, 0, 1)[None] / 255
            image = (pixels - torch.tensor(backbone.mean)[:, None, None]) / torch.tensor(backbone.std)[:, None, None]
            maps += [backbone(image)[0], clean(image)[0]]
    palette = Palette(maps)
    for (number, sheet), row in itertools.product(enumerate(pngs(done)), range(2)):
        top = GAP + HEADING + row * (48 + HEADING + GAP)
        drawn = sheet[top : top + 48, GAP : GAP + 80]
        expected = palette.colours("pca", maps[2 * number + row]).repeat(8, 0).repeat(8, 1)
        assert np.abs(drawn - expected.astype(int)).max() <= 1, (number, row)


def test_features_are_computed_once_in_a_shared_forward_pass(render: Render, frames: Path, tmp_path: Path) -> None:
    backbone = tiny.backbone()
    denoiser = tiny_denoiser.write(tmp_path / "d", tiny_denoiser.denoiser(backbone), "d.safetensors")
    _ = backbone.fingerprint
    planted = next(module for module in backbone.modules() if isinstance(module, tiny_artifact.Planted))
    before = planted.passes
    cleaners = Cleaners(denoiser=str(denoiser))
    render(frames, backbone=backbone, features="raw,denoiser", batch_size=2, cleaners=cleaners)
    assert planted.passes - before == 5  # ten frames in pairs; the colours were fitted to four of them


def test_all_panels_and_features(render: Render, frames: Path, tmp_path: Path) -> None:
    backbone = tiny.backbone()
    palette = tmp_path / "palette.safetensors"
    write_palette(Palette([torch.randn(6, 7, tiny_denoiser.CHANNELS) for _ in range(2)]), palette)
    artifact = tmp_path / "g.safetensors"
    tiny_artifact.artifact_of(backbone).save(artifact)
    done = render(
        frames,
        backbone=backbone,
        panels=",".join(PANELS),
        features="raw,subtract,exact",
        palette=str(palette),
        max_frames=2,
        views=6,
        cleaners=Cleaners(artifact=str(artifact)),
    )
    sheets = pngs(done)
    assert len(PANELS) == 10
    assert sheets[0].shape == (GAP + 3 * (48 + HEADING + GAP), GAP + 10 * (80 + GAP), 3)
    assert not np.array_equal(sheets[0], sheets[1])


def test_features_by_default_are_raw_and_clean_ones_of_one_pass() -> None:
    backbone, options = tiny.backbone(), VideoOptions()
    artifact = tiny_artifact.artifact_of(backbone)
    for cleaners, expected in (
        (Cleaners(), "raw,project"),
        (Cleaners(artifact=artifact), "raw,subtract"),
        (Cleaners(denoiser=tiny_denoiser.denoiser(backbone)), "raw,denoiser"),
    ):
        assert options.with_features(backbone, cleaners).features == expected
    assert VideoOptions(features="exact").with_features(backbone, Cleaners()).features == "exact"
    bundled = load_backbone("vit_small_patch14_dinov2.lvd142m", weights="bundled", device="cpu")
    assert options.with_features(bundled, Cleaners()).names == ("raw", "distilled")


def test_exact_uses_the_given_artifact(tmp_path: Path) -> None:
    backbone, options = tiny.backbone(), VideoOptions(features="exact", views=6)
    file = str(tmp_path / "g.safetensors")
    tiny_artifact.artifact_of(backbone).save(file)
    given = FrameFeatures(backbone, Cleaners(artifact=file), options)
    frame = np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    found = given(frame[None])["exact"][0]
    by_hand = denoise_image(backbone, frame, artifact=file, views=6, held_out=0, size=(56, 56)).semantic
    torch.testing.assert_close(found, by_hand)
    own = FrameFeatures(backbone, Cleaners(), options)
    assert not torch.allclose(own(frame[None])["exact"][0], found, atol=1e-3)
    assert own.identity != given.identity


@pytest.mark.parametrize("constant", ["channel", "all"])
def test_constant_features_are_drawn(render: Render, frames: Path, constant: str) -> None:
    def extractor(image: Tensor) -> Tensor:
        pooled = torch.nn.functional.avg_pool2d(image, 8).permute(0, 2, 3, 1)
        flat = torch.full_like(pooled, 3.0)
        return flat if constant == "all" else torch.cat([pooled, flat], dim=-1)

    panels = "pca,kmeans,first,second,third,foreground-pca,norm,foreground"
    sheets = pngs(render(frames, backbone=tiny_artifact.plain(extractor), panels=panels, max_frames=3))
    assert len(sheets) == 3
    if constant == "all":
        assert np.array_equal(sheets[0], sheets[2])
        panel = sheets[0][GAP + HEADING :][:48, GAP : GAP + 80]
        assert (panel == panel[0, 0]).all()


def test_stride_below_the_patch_size_gives_finer_maps(render: Render, frames: Path) -> None:
    coarse, fine = (
        pngs(render(frames, f"stride{stride}", backbone=tiny_denoiser.backbone(stride=stride), panels="pca"))[0]
        for stride in (8, 4)
    )
    colours = [len(np.unique(sheet[GAP + HEADING :].reshape(-1, 3), axis=0)) for sheet in (coarse, fine)]
    assert colours[1] > 2 * colours[0]


class Stopped(Exception):
    """Simulates a killed process."""


def stop_at(monkeypatch: pytest.MonkeyPatch, frame: int) -> None:
    """Make the next run stop while it draws this frame."""
    drawn = rendering._Run._drawn

    def draw(self: Any, item: Any, *rest: Any) -> Any:
        if item.number == frame:
            raise Stopped
        return drawn(self, item, *rest)

    monkeypatch.setattr(rendering._Run, "_drawn", draw)


@pytest.mark.parametrize("frame", [0, 3, 4, 9])
def test_interrupted_run_resumes_without_losing_frames(
    render: Render, frames: Path, monkeypatch: pytest.MonkeyPatch, frame: int
) -> None:
    whole = render(frames, "whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, frame)
        render(frames)
    (unfinished,) = (path for path in whole.path.parent.glob(".*") if path.is_dir())
    assert unfinished.name == ".out.parts"
    backbone = tiny.backbone()
    _ = backbone.fingerprint
    planted = next(module for module in backbone.modules() if isinstance(module, tiny_artifact.Planted))
    before = planted.passes
    done = render(frames, backbone=backbone, batch_size=1)
    assert done.resumed == frame // 4 * 4
    assert planted.passes - before == (10 if frame < 4 else 10 - done.resumed)  # colours are not fitted again
    assert done.frames == 10
    for resumed, straight in zip(pngs(done), pngs(whole), strict=True):
        assert np.array_equal(resumed, straight)
    for resumed, straight in zip(tiny.decoded(done.path), tiny.decoded(whole.path), strict=True):
        assert np.abs(resumed - straight.astype(float)).mean() < 1
    assert tiny.seconds(done.path) == tiny.seconds(whole.path)
    assert not unfinished.exists()


def test_run_interrupted_before_joining_its_parts_is_finished(
    render: Render, frames: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **_named: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("denoising_vit.show.video.parts.join", fail)
        render(frames)
    done = render(frames)
    assert (done.resumed, done.frames) == (10, 10)
    assert len(tiny.decoded(done.path)) == 10
    assert tiny.seconds(done.path)[1] == pytest.approx(10 / 24, abs=1e-4)


def test_incomplete_part_is_rendered_again(
    render: Render, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 9)
        render(frames)
    part = tmp_path / ".out.parts" / "000001.nut"
    part.write_bytes(part.read_bytes()[:200])
    (tmp_path / ".out.parts" / ".000002.nut.x.part").touch()  # left by a process that was killed while writing
    done = render(frames)
    assert done.resumed == 4
    assert len(tiny.decoded(done.path)) == 10


def test_unfinished_run_with_other_settings_is_rejected(
    render: Render, frames: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 9)
        render(frames)
    with pytest.raises(ClipError, match=r"settings \(panels image,pca, now pca\); use the same settings to resume it"):
        render(frames, panels="pca")
    with pytest.raises(ClipError, match="a different backbone or weights"):
        render(frames, backbone=tiny.backbone(seed=1))
    done = render(frames, panels="pca", overwrite=True)
    assert (done.resumed, done.frames) == (0, 10)


def test_interrupted_overwriting_resumes(render: Render, frames: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render(frames)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 9)
        render(frames, overwrite=True)
    assert render(frames).status == "kept"  # the existing file stays until the new one is complete
    assert render(frames, overwrite=True).resumed == 8


def test_finished_video_is_kept(render: Render, frames: Path, tmp_path: Path) -> None:
    first = render(frames)
    content = first.path.read_bytes()
    kept = render(frames)
    assert (kept.status, kept.notes) == ("kept", ())
    other = render(frames, size=40)
    assert other.status == "kept"
    assert "size 80, now 40); use --overwrite to redo it" in other.notes[0]
    assert first.path.read_bytes() == content
    assert render(frames, max_frames=3, overwrite=True).status == "done"
    assert len(tiny.decoded(first.path)) == len(pngs(first)) == 3  # no PNG of the longer one is left
    (tmp_path / "mine.mp4").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists and was not written by dvit video"):
        render(frames, "mine")


def test_damaged_and_mismatched_frames_are_reported(render: Render, tmp_path: Path) -> None:
    path = tiny.film(
        tmp_path / "a.avi", [tiny.picture(number) for number in range(8)], codec="mjpeg", pix_fmt="yuvj420p"
    )
    tiny.damage(path, 5)
    done = render(path)
    assert done.frames == 8
    assert done.notes == ("1 of 8 frames could not be read (damaged frame); the previous frame is repeated",)
    sheets = pngs(done)
    assert np.array_equal(sheets[5], sheets[4])
    clip = tiny.folder(tmp_path / "mixed", [tiny.picture(0), tiny.picture(1, (80, 48))])
    (note,) = render(clip, "boxed").notes
    assert note == "1 frames have a different aspect ratio from the first and are padded with black bars"


def test_progress_counts_each_frame_once(render: Render, frames: Path) -> None:
    reported: list[tuple[int, int]] = []
    render(frames, progress=lambda done, total: reported.append((done, total)), batch_size=2)
    assert {total for _, total in reported} == {10}
    counts = [done for done, _ in reported]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 10)


def test_only_a_few_frames_are_held_in_memory(frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding stays only a few batches ahead of drawing."""
    clip = tiny.folder(tmp_path / "long", [tiny.picture(number % 5) for number in range(60)])
    at = {"decoded": 0, "drawn": 0}
    apart = []
    drawn, sized = rendering._Run._drawn, rendering.Clip.frames

    def draw(self: Any, item: Any, *rest: Any) -> Any:
        at["drawn"] = item.number
        apart.append(at["decoded"] - at["drawn"])
        return drawn(self, item, *rest)

    def read(self: Any, *rest: Any, **more: Any) -> Any:
        for frame in sized(self, *rest, **more):
            at["decoded"] = frame.number
            yield frame

    monkeypatch.setattr(rendering._Run, "_drawn", draw)
    monkeypatch.setattr(rendering.Clip, "frames", read)
    render_video(tiny.backbone(), clip, tmp_path / "a.mp4", options=tiny.SMALL, batch_size=2)
    assert len(apart) == 60
    assert max(apart) <= 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "raw,new"}, "unknown features: 'new'; choose from raw, subtract"),
        ({"panels": "image,image"}, "different panels, separated by commas, got image, image; choose from image, pca"),
        ({"panels": "dataset-pca"}, "needs a saved palette of a data set; give --palette FILE"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"panel_size": 8}, "panel_size must be at least 64"),
        ({"fps": float("nan")}, "fps must be 0.01 to 1000"),
        ({"side": "wide"}, "side must be 'long' or 'short'"),
    ],
    ids=str,
)
def test_wrong_options(render: Render, frames: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        render(frames, **changes)


def test_wrong_files(render: Render, frames: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such palette"):
        render(frames, panels="dataset-pca", palette=str(tmp_path / "absent"))
    with pytest.raises(DenoisingVitError, match="--distilled"):
        render(frames, features="distilled")
    with pytest.raises(ClipError, match=r"expected a name ending in \.mp4"):
        render_video(tiny.backbone(), frames, tmp_path / "a.avi", options=tiny.SMALL)
    with pytest.raises(ClipError, match="less than one patch of 8 pixels; increase --size"):
        render(frames, size=4)


def test_missing_encoder_is_reported(render: Render, frames: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("denoising_vit.show.video.encoding.ENCODERS", ("libnothing",))
    with pytest.raises(ClipError, match=r"has no H\.264 encoder: expected libnothing.*pip install"):
        render(frames)


def test_frame_rates_of_folders() -> None:
    rates = {fps: VideoOptions(fps=fps).rate for fps in (24, 23.976, 29.97, 12.5, 60, 0.5)}
    assert rates == {
        24: 24,
        23.976: Fraction(24000, 1001),
        29.97: Fraction(30000, 1001),
        12.5: Fraction(25, 2),
        60: 60,
        0.5: Fraction(1, 2),
    }
