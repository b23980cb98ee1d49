"""The picture of one frame: layout and legible headings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_denoiser
from denoising_vit.errors import FormatError
from denoising_vit.maps import Palette, read_palette, write_palette
from denoising_vit.show.options import VideoOptions, panel_size, shown_size
from denoising_vit.show.video.films import over_white, upright
from denoising_vit.show.video.frames import GAP, HEADING, FrameSheet

PANEL = 60, 101


def drawn(*, smooth: bool = False) -> np.ndarray:
    sheet = FrameSheet(("raw", "denoiser"), ("image", "pca"), PANEL, smooth=smooth)
    raw = np.zeros((2, 3, 3), np.uint8)
    raw[0, 0] = 200
    maps: dict[tuple[str | None, str], np.ndarray] = {("raw", "pca"): raw, ("denoiser", "pca"): np.full_like(raw, 77)}
    return sheet.draw(np.full((*PANEL, 3), 9, np.uint8), maps)


def test_rows_and_columns() -> None:
    sheet = drawn()
    assert sheet.shape[0] % 2 == sheet.shape[1] % 2 == 0
    left, right = GAP, GAP + PANEL[1] + GAP
    row = PANEL[0] + HEADING + GAP
    raw = sheet[GAP + HEADING :][: PANEL[0], right : right + PANEL[1]]
    clean = sheet[GAP + row + HEADING :][: PANEL[0], right : right + PANEL[1]]
    image = sheet[GAP + row // 2 + HEADING :][: PANEL[0], left : left + PANEL[1]]
    assert (raw[:30, :33] == 200).all() and (raw[30:] == 0).all() and (raw[:, 35:] == 0).all()  # sharp
    assert (clean == 77).all()
    assert (image == 9).all()


def test_headings_are_dark_on_white() -> None:
    sheet = drawn()
    heading = sheet[GAP : GAP + HEADING, GAP + PANEL[1] + GAP :]
    assert heading.min() < 60 and heading.max() == 255
    assert ((heading < 128).any(-1)).mean() > 0.02
    assert (sheet[: GAP + HEADING, : GAP + PANEL[1]] == 255).all()  # the image has its own heading, lower down


def test_smooth_maps_have_no_edges() -> None:
    right = GAP + PANEL[1] + GAP
    raw = drawn(smooth=True)[GAP + HEADING :][: PANEL[0], right : right + PANEL[1]].astype(int)
    assert np.abs(np.diff(raw, axis=0)).max() < 30


def test_narrow_panels_have_a_smaller_font() -> None:
    sheet = FrameSheet(("denoiser",), ("first", "second"), (120, 64), smooth=False)
    picture = np.zeros((2, 1, 3), np.uint8)
    pixels = sheet.draw(picture, {("denoiser", "first"): picture, ("denoiser", "second"): picture})
    assert (pixels[: GAP + HEADING, 64 + GAP : 64 + 2 * GAP] == 255).mean() > 0.9  # headings do not overlap


@pytest.mark.parametrize(
    ("size", "options", "shown", "panel"),
    [
        ((480, 854), VideoOptions(), (288, 520), (270, 480)),
        ((854, 480), VideoOptions(), (520, 288), (480, 270)),
        ((480, 854), VideoOptions(size=96, side="short"), (96, 168), (270, 480)),
        ((500, 500), VideoOptions(size=81, panel_size=101), (80, 80), (100, 100)),
    ],
)
def test_sizes(size: tuple[int, int], options: VideoOptions, shown: tuple[int, int], panel: tuple[int, int]) -> None:
    assert shown_size(size, tiny_denoiser.backbone(), options) == shown
    assert panel_size(size, options) == panel


def test_upright_by_hand() -> None:
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)  # 0 1 2 / 3 4 5
    one = 1 << 16

    def turned(a: int, b: int, c: int, d: int) -> list[list[int]]:
        return upright(pixels, (a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30))[..., 0].tolist()

    assert turned(1, 0, 0, 1) == [[0, 1, 2], [3, 4, 5]]
    assert turned(0, 1, -1, 0) == [[3, 0], [4, 1], [5, 2]]  # a quarter turn to the right
    assert turned(0, -1, 1, 0) == [[2, 5], [1, 4], [0, 3]]
    assert turned(-1, 0, 0, 1) == [[2, 1, 0], [5, 4, 3]]
    assert turned(0, 1, 1, 0) == [[0, 3], [1, 4], [2, 5]]
    assert upright(pixels, None) is pixels


def test_over_white_by_hand() -> None:
    pixels = np.array([[[0, 100, 255, 0], [0, 100, 255, 255], [0, 100, 200, 51]]], np.uint8)
    assert over_white(pixels).tolist() == [[[255, 255, 255], [0, 100, 255], [204, 224, 244]]]


def test_palette_with_only_some_kinds_of_colours(tmp_path: Path) -> None:
    features = torch.randn(5, 7, 11)
    path = tmp_path / "some.safetensors"
    palette = Palette([features])
    write_palette(palette, path, {"basis", "norms"})
    again = read_palette(path)
    for kind in ("pca", "second", "norm"):
        assert np.array_equal(again.colours(kind, features), palette.colours(kind, features))
    with pytest.raises(ValueError, match="expected at least one feature map"):
        again.colours("foreground", features)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'\\"norms\\"', b'\\"other\\"'))
    with pytest.raises(FormatError, match="damaged palette"):
        read_palette(path)
