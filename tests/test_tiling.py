"""Tiled features of large pictures: layout, blending, reading by regions, and seams."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import denoising_vit as dv
import planted
from denoising_vit.backbones import Backbone
from denoising_vit.data import pictures
from denoising_vit.data.pictures import TiffPicture, open_picture, picture_digest, reduced
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.denoise import Denoising
from denoising_vit.errors import EvaluationError, PhotoError, PlanError, SizeError
from denoising_vit.extractors import KINDS, Cleaners
from denoising_vit.tiling.denoising import TiledDenoising
from denoising_vit.tiling.features import Alignment, seam_ratio
from denoising_vit.tiling.layout import TileLayout, TileOptions

pytestmark = pytest.mark.usefixtures("one_thread")

P = planted.PATCH


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def normalised(pixels: np.ndarray, backbone: Backbone) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.mean, backbone.std))
    return ((torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - mean) / std)[None]


# --- layout ---


@pytest.mark.parametrize(
    ("side", "tile", "overlap", "patch", "stride"),
    [(1411, 518, 129, 14, 14), (700, 518, 0, 14, 14), (37, 16, 8, 4, 4), (301, 56, 20, 14, 7), (40, 56, 28, 8, 8)],
)
def test_tiles_cover_a_side_and_weights_sum_to_one(side: int, tile: int, overlap: int, patch: int, stride: int) -> None:
    layout = TileLayout.make(side, tile, overlap, patch, stride)
    assert abs(layout.side - side) <= stride / 2 and (layout.side - patch) % stride == 0
    np.testing.assert_allclose(layout.weights.sum(0), 1, rtol=1e-6)
    for index, row in enumerate(layout.weights):
        seen = layout.patches(index)
        assert not row[: seen.start].any() and not row[seen.stop :].any()
        assert seen.start * stride + layout.tile <= layout.side
    shared = [a + layout.shown - b for a, b in itertools.pairwise(layout.starts)]
    assert all(least >= min(round(overlap / stride), layout.shown // 2) for least in shared)
    assert len(layout.seams) == len(layout.starts) - 1


def test_weights_of_three_tiles_by_hand() -> None:
    # 8 patches of 4 pixels, tiles of 4 patches, 2 shared: tiles at 0, 2, 4; sin^2 ramps over 2 patches.
    layout = TileLayout.make(32, 16, 8, 4, 4)
    assert layout.starts == (0, 2, 4) and layout.shown == 4 and layout.seams == (2, 4)
    low, high = np.sin(np.pi / 8) ** 2, np.cos(np.pi / 8) ** 2
    np.testing.assert_allclose(layout.weights[1], [0, 0, low, high, high, low, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(layout.weights[0], [1, 1, high, low, 0, 0, 0, 0], rtol=1e-6)


def test_without_overlap_each_patch_comes_from_the_nearest_tile() -> None:
    layout = TileLayout.make(7 * 4, 16, 0, 4, 4)  # tiles of 4 patches at 0 and 3: patch 3 lies in both, at their ends
    np.testing.assert_array_equal(layout.weights, [[1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]])
    assert layout.seams == (3,)


# --- features ---


@pytest.mark.parametrize("overlap", [0, 24, 40])
def test_tiled_local_features_match_those_of_the_whole_picture(overlap: int) -> None:
    backbone, pixels = planted.backbone(), picture(200, 328)
    tiled = dv.tiled_features(backbone, pixels, tile=80, overlap=overlap)
    assert tiled.dtype == torch.float32 and tuple(tiled.shape) == (25, 41, planted.CHANNELS)
    torch.testing.assert_close(tiled, backbone(normalised(pixels, backbone))[0], atol=1e-4, rtol=1e-4)


def test_side_off_the_patch_grid_is_resized_by_less_than_a_patch() -> None:
    backbone, pixels = planted.backbone(), picture(203, 325)
    tiled = dv.tiled_features(backbone, pixels, tile=80)
    assert tuple(tiled.shape[:2]) == (25, 41)
    whole = dv.tiled_features(backbone, pixels, tile=400)  # one tile
    torch.testing.assert_close(tiled, whole, atol=1e-3, rtol=1e-3)


def test_picture_is_resized_to_the_given_size() -> None:
    backbone = planted.backbone()
    constant = np.full((400, 600, 3), 90, np.uint8)
    tiled = dv.tiled_features(backbone, constant, tile=80, size=(200, 304))
    assert tuple(tiled.shape[:2]) == (25, 38)
    torch.testing.assert_close(tiled, tiled[:1, :1].expand_as(tiled), atol=1e-2, rtol=0)  # root of a rounding error


def test_each_forward_pass_reads_only_one_tile() -> None:
    backbone, seen, read = planted.backbone(), [], []

    class Watched(np.ndarray):
        def __getitem__(self, region):
            found = np.asarray(self)[region]
            read.append(found.size)
            return found

    def extractor(image: Tensor) -> Tensor:
        seen.append(tuple(image.shape))
        return backbone(image)

    reported: list[tuple[int, int]] = []
    pixels = picture(200, 328).view(Watched)
    dv.tiled_features(
        extractor, pixels, tile=80, overlap=16, backbone=backbone, progress=lambda *done: reported.append(done)
    )
    assert set(seen) == {(1, 3, 80, 80)}
    assert max(read) <= 84 * 84 * 3  # two pixels on each side for the kernel
    assert reported == [(n + 1, len(seen)) for n in range(len(seen))]


@pytest.mark.parametrize("name", ["raw", "project", "average"])
def test_tiled_registry_kinds_match_direct_calls(name: str) -> None:
    backbone, pixels = planted.backbone(), picture(88, 88)
    extractor, _ = Cleaners().extractor(name, backbone)
    one = dv.tiled_features(extractor, pixels)
    torch.testing.assert_close(one, extractor(normalised(pixels, backbone))[0], atol=1e-4, rtol=1e-4)
    assert tuple(dv.tiled_features(extractor, picture(150, 170)).shape) == (19, 21, planted.CHANNELS)
    assert not KINDS[name].per_image


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tile": 81}, SizeError, "a side of 81 pixels does not fit the patch grid.*80 or 88"),
        ({"tile": 80, "overlap": 41}, PlanError, r"overlap must be 0 to 40 pixels \(half a tile\), got 41"),
        ({"max_pixels": 100}, PhotoError, "exceed the limit of 100; .*raise the limit"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(
    options: dict[str, int], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(picture(100, 90)).save(path)
    with pytest.raises(error, match=message):
        dv.tiled_features(planted.backbone(), path, **options)  # pyright: ignore[reportArgumentType]


def test_extractor_without_a_backbone_is_rejected() -> None:
    with pytest.raises(PlanError, match=r"no attribute `backbone`.*give backbone="):
        dv.tiled_features(lambda image: image, picture(90, 90))


def test_an_overlap_without_tiles_is_refused() -> None:
    with pytest.raises(PlanError, match="overlap is 16 pixels, but there are no tiles"):
        TileOptions(overlap=16)


# --- seams ---


def test_blending_and_subtraction_reduce_seams_of_a_position_pattern() -> None:
    backbone = planted.backbone(share=1.0)
    smooth = Image.fromarray(picture(6, 9)).resize((400, 264), Image.Resampling.BICUBIC)
    layout = [TileLayout.make(side, 88, overlap, P, P) for overlap in (0, 40) for side in (264, 400)]
    nearest, blended = (
        seam_ratio(dv.tiled_features(backbone, smooth, overlap=overlap), rows.seams, columns.seams)
        for overlap, rows, columns in ((0, *layout[:2]), (40, *layout[2:]))
    )
    clean = planted.backbone()
    none = seam_ratio(dv.tiled_features(clean, smooth, overlap=0), layout[0].seams, layout[1].seams)
    assert nearest > 1.5 > blended and nearest > 2 * none - 0.5


def test_seam_ratio_by_hand() -> None:
    features = torch.tensor([0.0, 1, 4, 5])[None, :, None].expand(3, 4, 1)  # a step of 3 between columns 1 and 2
    assert seam_ratio(features, [], [1]) == pytest.approx(3 * 3 / 3 / (6 / 14))  # 6 steps of 1, 8 of 0
    with pytest.raises(EvaluationError, match="expected at least one tile border"):
        seam_ratio(features, [], [])


# --- alignment ---


def test_alignment_reduces_random_offsets_of_tiles() -> None:
    backbone, pixels = planted.backbone(), picture(408, 408)
    stream = torch.Generator().manual_seed(0)

    def moved(image: Tensor) -> Tensor:
        return backbone(image) + torch.randn(planted.CHANNELS, generator=stream)

    local = backbone(normalised(pixels, backbone))[0]
    left = {}
    for align in (False, True):
        apart = dv.tiled_features(moved, pixels, tile=80, overlap=24, align=align, backbone=backbone) - local
        left[align] = float((apart - apart.mean((0, 1))).square().mean())
    assert left[False] > 0.3 and left[True] < 0.25 * left[False]


def test_pattern_shared_by_all_tiles_gives_no_offsets() -> None:
    backbone, pixels = planted.backbone(), picture(192, 304)  # tiles evenly spaced

    def ramped(image: Tensor) -> Tensor:
        return backbone(image) + torch.linspace(0, 1, image.shape[3] // P)[:, None]

    apart, aligned = (
        dv.tiled_features(ramped, pixels, tile=80, overlap=24, align=align, backbone=backbone)
        for align in (False, True)
    )
    torch.testing.assert_close(aligned, apart, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1)])
def test_alignment_of_a_few_tiles(shape: tuple[int, int]) -> None:
    rows, columns = (TileLayout.make(side, 80, 24, P, P) for side in (56 * count + 24 for count in shape))
    assert (len(rows.starts), len(columns.starts)) == shape
    alignment, wanted = Alignment(rows, columns), torch.tensor([0.0, 3, 1, 0])
    for row, column in np.ndindex(shape):
        alignment.add(row, column, torch.full((rows.shown, columns.shown, 2), float(-wanted[row + column])))
    found = alignment.offsets(2)[..., 0].flatten()
    if found.numel() == 4:  # first and last are equal, so no part is taken as a pattern of the tiles
        torch.testing.assert_close(found, wanted - wanted.mean(), atol=0.1, rtol=0)
    assert found.shape == (shape[0] * shape[1],) and bool(torch.isfinite(found).all())


def test_results_record_whether_they_are_aligned(tmp_path: Path) -> None:
    backbone, options = planted.backbone(), DenoiseOptions(method="project")
    aligned = TiledDenoising(backbone, options, TileOptions(tile=88))
    apart = TiledDenoising(backbone, options, TileOptions(tile=88, align=False))
    result = apart(picture(88, 160))
    assert "align" not in result.info["tiles"]  # as in files of earlier versions
    assert apart.made(result.info) and not aligned.made(result.info)


# --- denoising ---


@pytest.mark.parametrize("method", ["project", "exact"])
def test_a_denoised_picture_is_blended_from_denoised_tiles(method: str, tmp_path: Path) -> None:
    backbone, pixels = planted.backbone(), picture(88, 160)
    options = DenoiseOptions(method=method, views=6, held_out=2)
    tiled = TiledDenoising(backbone, options, TileOptions(tile=88, overlap=0))
    reported: list[tuple[int, int]] = []
    result = tiled(pixels, progress=lambda *done: reported.append(done))
    assert result.size == (88, 160) and tuple(result.semantic.shape) == (11, 20, planted.CHANNELS)
    left = Denoising(backbone, options)(pixels[:, :88])
    torch.testing.assert_close(result.semantic[:, :10], left.semantic[:, :10], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(result.raw[:, :10], left.raw[:, :10], atol=1e-3, rtol=1e-3)
    assert reported[-1] == (2 * tiled.work, 2 * tiled.work)
    assert (result.heldout_r2 is None) == (method == "project")
    result.save(tmp_path / "a.safetensors")
    again = dv.Decomposition.load(tmp_path / "a.safetensors")
    torch.testing.assert_close(again.semantic, result.semantic, atol=1e-2, rtol=1e-2)
    assert tiled.made(again.info)
    assert not Denoising(backbone, options).made(again.info) and not tiled.made(left.info)
    assert not TiledDenoising(backbone, options, TileOptions(tile=88, overlap=16)).made(again.info)


def test_tiled_overlapping_patches_match_those_of_the_whole_picture() -> None:
    class Dense(torch.nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return torch.nn.functional.avg_pool2d(image, 8, 4)

    backbone = dv.load_backbone(Dense(), patch_size=8, stride=4, default_size=88, device="cpu")
    pixels = picture(88, 160)
    result = TiledDenoising(backbone, DenoiseOptions(method="average"), TileOptions(tile=88))(pixels)
    torch.testing.assert_close(result.raw, backbone(normalised(pixels, backbone))[0], atol=1e-4, rtol=1e-4)
    tiles = dv.tiled_features(Cleaners().extractor("average", backbone)[0], pixels)
    torch.testing.assert_close(result.semantic, tiles, atol=1e-2, rtol=0)


# --- pictures ---


@pytest.fixture
def tiff(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A tiled TIFF, and its pixels."""
    tifffile = pytest.importorskip("tifffile")
    pixels, path = picture(300, 410), tmp_path / "large.tif"
    tifffile.imwrite(path, pixels, tile=(64, 64), compression="zlib", photometric="rgb")
    return path, pixels


def test_a_large_tiff_is_read_region_by_region(tiff: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    path, pixels = tiff
    opened = open_picture(path, whole=1000)
    assert isinstance(opened, TiffPicture) and opened.shape == pixels.shape
    np.testing.assert_array_equal(opened[70:200, 30:331], pixels[70:200, 30:331])
    assert isinstance(open_picture(path), np.ndarray)
    monkeypatch.setattr(pictures, "_AT_ONCE", 5000)  # bands of a few rows
    np.testing.assert_array_equal(reduced(opened, 100), np.asarray(Image.fromarray(pixels).reduce(5)))
    assert picture_digest(opened) != picture_digest(pixels)
    with pytest.raises(PhotoError, match="410 x 300 pixels exceed the limit of 2,000"):
        open_picture(path, whole=1000, max_pixels=2000)


@pytest.mark.parametrize("kind", ["gray", "rgba", "deep"])
def test_gray_transparent_and_16_bit_tiff(kind: str, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    path, chance = tmp_path / "a.tif", np.random.default_rng(0)
    if kind == "gray":
        pixels = chance.integers(0, 256, (40, 50)).astype(np.uint8)
        tifffile.imwrite(path, pixels)
        expected = np.repeat(pixels[..., None], 3, -1)
    elif kind == "rgba":
        pixels = chance.integers(0, 256, (40, 50, 4)).astype(np.uint8)
        pixels[:20, :, 3], pixels[20:, :, 3] = 0, 255
        tifffile.imwrite(path, pixels, photometric="rgb", extrasamples=["unassalpha"])
        expected = np.concatenate([np.full((20, 50, 3), 255, np.uint8), pixels[20:, :, :3]])
    else:
        pixels = chance.integers(0, 65536, (40, 50, 3)).astype(np.uint16)
        tifffile.imwrite(path, pixels, photometric="rgb")
        expected = (pixels >> 8).astype(np.uint8)
    np.testing.assert_array_equal(TiffPicture(path)[0:40, 0:50], expected)


def test_a_pyramid_is_read_at_the_smallest_level_that_suffices(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels, path = picture(256, 320), tmp_path / "pyramid.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(pixels, subifds=2, tile=(64, 64), photometric="rgb")
        for step in (2, 4):
            writer.write(pixels[::step, ::step], subfiletype=1, tile=(64, 64), photometric="rgb")
    shapes = [TiffPicture(path, size).shape[:2] for size in (None, (200, 200), (128, 160), (60, 60))]
    assert shapes == [(256, 320), (256, 320), (128, 160), (64, 80)]


def test_tiff_that_cannot_be_read_by_regions_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(40, 50), photometric="rgb", extratags=[(0x0112, "H", 1, 6, True)])
    with pytest.raises(PhotoError, match="rotated; expected an upright TIFF, grey or interleaved RGB"):
        TiffPicture(path)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(PhotoError, match="needs tifffile: install the extra `tiff`"):
        TiffPicture(path)


def test_jpeg_beyond_the_limit_is_decoded_at_a_smaller_scale(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(picture(400, 600)).save(path)
    assert open_picture(path, size=(100, 140), max_pixels=60_000).shape == (200, 300, 3)
    assert open_picture(path, size=(100, 140)).shape == (400, 600, 3)
    with pytest.raises(PhotoError, match="600 x 400 pixels exceed the limit of 60,000"):
        open_picture(path, max_pixels=60_000)
