"""Maps of a photo's features, side by side on one sheet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import planted
from denoising_vit.data.photos import is_panel
from denoising_vit.denoise import denoise_image
from denoising_vit.errors import DenoiserError, FormatError, PlanError
from denoising_vit.extractors import Cleaners
from denoising_vit.maps.kinds import MAP_KINDS
from denoising_vit.maps.sheet import CELL, GAP, LEFT, RIGHT, Sheet
from denoising_vit.show.options import ShowOptions
from denoising_vit.show.sheets import PhotoExtractor, ShownPhoto, draw_sheet, palette_of, pictures
from denoising_vit.tiling.denoising import TiledDenoising
from denoising_vit.tiling.layout import TileOptions

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = ShowOptions(features="raw,exact", maps=",".join(MAP_KINDS), views=9)


def shown(seed: int = 0, names: tuple[str, ...] = ("raw", "exact")) -> ShownPhoto:
    extractor = PhotoExtractor(planted.backbone(share=0.5), names, Cleaners(), OPTIONS.denoising())
    return extractor(planted.photos(1, seed)[0], name="a.png")


@pytest.fixture(scope="module")
def photo() -> ShownPhoto:
    return shown()


def test_features_match_denoise_image(photo: ShownPhoto) -> None:
    result = denoise_image(planted.backbone(share=0.5), photo.pixels, options=OPTIONS.denoising())
    maps = photo.maps()
    assert list(maps) == ["raw", "exact"]
    assert (maps["raw"] == result.raw).all() and (maps["exact"] == result.semantic).all()


def test_raw_features_alone_take_one_forward_pass() -> None:
    counted: list[int] = []
    backbone, pixels, options = planted.backbone(), planted.photos(1)[0], OPTIONS.denoising()
    extractor = PhotoExtractor(backbone, ["raw"], Cleaners(), options)
    found = extractor(pixels, progress=lambda done, _: counted.append(done))
    assert counted[-1] == extractor.passes == 1
    assert (found.maps()["raw"] == denoise_image(backbone, pixels, method="subtract", artifact="none").raw).all()


def test_progress_counts_up_to_the_number_of_passes() -> None:
    counted: list[int] = []
    extractor = PhotoExtractor(planted.backbone(), ["raw", "exact"], Cleaners(), OPTIONS.denoising())
    extractor(planted.photos(1)[0], progress=lambda done, _: counted.append(done))
    assert counted == sorted(counted) and counted[-1] == extractor.passes == 9


def test_tiled_features_match_tiled_denoising(tmp_path: Path) -> None:
    backbone, options, tiling = planted.backbone(), OPTIONS.denoising(), TileOptions(tile=88, overlap=16)
    pixels = np.random.default_rng(0).integers(0, 256, (88, 200, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    counted: list[tuple[int, int]] = []
    extractor = PhotoExtractor(backbone, ["raw", "project", "exact"], Cleaners(), options, tiling)
    found = extractor(extractor.open(tmp_path / "a.png"), progress=lambda *done: counted.append(done))
    for name in ("project", "exact"):
        result = TiledDenoising(backbone, replace(options, method=name), tiling)(pixels)
        assert (found.maps()[name] == result.semantic).all() and result.size == (88, 200)
    assert (
        found.maps()["raw"] == TiledDenoising(backbone, replace(options, method="project"), tiling)(pixels).raw
    ).all()
    done, totals = zip(*counted, strict=True)
    assert list(done) == sorted(done) and counted[-1] == (30, 30) and set(totals) == {30}  # (1 + 9) passes of 3 tiles


def test_finer_maps_apply_to_exact_but_not_raw_features(photo: ShownPhoto) -> None:
    h, w, _ = photo.maps()["raw"].shape
    finer = photo.maps(3)
    assert finer["raw"].shape[:2] == (h, w) and finer["exact"].shape[:2] == (3 * h, 3 * w)


@pytest.mark.parametrize("kind", MAP_KINDS)
def test_each_kind_of_map_is_drawn_for_the_features_that_have_it(kind: str, photo: ShownPhoto) -> None:
    found = pictures(photo, palette_of([photo], OPTIONS), ShowOptions(maps=kind))[kind]
    assert list(found) == ["raw", "exact"] and found["exact"] is not None
    assert len(np.unique(found["exact"].pixels.reshape(-1, 3), axis=0)) > 1
    assert (found["raw"] is None) == (kind in ("artifact", "artifact-norm", "residual"))


def test_raw_and_clean_maps_share_one_scale(photo: ShownPhoto) -> None:
    found = pictures(photo, palette_of([photo], OPTIONS), ShowOptions(maps="norm"))["norm"]
    raw, exact = found["raw"], found["exact"]
    assert raw is not None and exact is not None and raw.bar == exact.bar is not None


def test_photos_have_their_own_colours_unless_shared(photo: ShownPhoto) -> None:
    other = shown(1)
    alone, shared = palette_of([photo], OPTIONS), palette_of([photo, other], OPTIONS)
    first, second = (pictures(photo, one, ShowOptions(maps="pca"))["pca"]["raw"] for one in (alone, shared))
    assert first is not None and second is not None and not (first.pixels == second.pixels).all()


def test_similarity_is_to_the_given_patch(photo: ShownPhoto) -> None:
    for at in ((0.0, 0.0), (1.0, 1.0)):
        found = pictures(photo, palette_of([photo], OPTIONS), ShowOptions(maps="similarity", at=at))["similarity"][
            "raw"
        ]
        assert found is not None
        redness = found.pixels[..., 0].astype(int) - found.pixels[..., 2]
        corner = found.pixels[-1, -1] if at == (1.0, 1.0) else found.pixels[0, 0]
        assert corner[1] == found.pixels[redness > 0][:, 1].min()  # the deepest red


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_sheet_has_the_format_of_its_name_and_is_reproducible(suffix: str, photo: ShownPhoto, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}{suffix}" for name in "ab"]
    palette = palette_of([photo], OPTIONS)
    for path in files:
        draw_sheet([photo], [palette], path, OPTIONS, caption=["what it is"])
    first, second = (path.read_bytes() for path in files)
    assert first == second and first.startswith({".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[suffix])
    if suffix == ".png":
        assert is_panel(files[0])  # it is never read as a photo
    if suffix == ".svg":
        assert "what it is" in first.decode() and "residual norm" in first.decode()  # text is stored as text


def test_pictures_keep_the_aspect_ratio_of_their_photo(photo: ShownPhoto, tmp_path: Path) -> None:
    """A panorama and a portrait on one sheet with one kind of map: one row each."""
    wide = ShownPhoto("wide", np.zeros((40, 120, 3), np.uint8), photo.found)
    tall = ShownPhoto("tall", np.zeros((120, 60, 3), np.uint8), photo.found)
    options = ShowOptions(maps="pca")
    palette = palette_of([photo], options)
    draw_sheet([wide, tall], [palette, palette], tmp_path / "s.png", options)
    sheet = Sheet([3.0, 0.5], 3)
    assert [width / height for height, width in map(sheet.box, (0, 1))] == pytest.approx([3.0, 0.5], rel=0.01)
    with Image.open(tmp_path / "s.png") as image:
        assert image.width == LEFT + 3 * CELL + 2 * GAP + RIGHT


def test_other_file_extension_is_refused(photo: ShownPhoto, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"expected a name that ends in \.png, \.pdf, \.svg"):
        draw_sheet([photo], [palette_of([photo], OPTIONS)], tmp_path / "s.jpg", OPTIONS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maps": "pca,pac"}, "unknown maps: 'pac'; choose from pca, kmeans"),
        ({"features": "raw,exakt"}, "unknown features: 'exakt'; choose from raw, subtract"),
        ({"at": (0.5, 1.5)}, "at must be two fractions"),
        ({"clusters": 0}, "clusters must be a whole number of at least 1, got 0"),
        ({"views": 0}, "views must be"),
        ({"upsample": 0}, "upsample must be"),
    ],
)
def test_wrong_options_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        ShowOptions(**changes).validate()  # pyright: ignore[reportArgumentType]


def test_missing_denoiser_is_reported() -> None:
    assert ShowOptions().names(planted.backbone(), Cleaners()) == ("raw", "exact")
    assert ShowOptions().names(planted.backbone(), Cleaners(distilled="a.safetensors")) == ("raw", "distilled")
    with pytest.raises(DenoiserError, match="the package has no denoiser"):
        PhotoExtractor(planted.backbone(), ["denoiser"], Cleaners(), OPTIONS.denoising())
