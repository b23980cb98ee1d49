"""Palettes: one set of colours for all compared maps, saved in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from denoising_vit.backbones.recorded import describe
from denoising_vit.errors import FormatError
from denoising_vit.files import KEY
from denoising_vit.maps import TITLES, Foreground, Palette, read_palette, write_palette
from denoising_vit.maps.palette import ENOUGH
from planted import backbone

CHANNELS = 12


def field(seed: int = 0, height: int = 14, width: int = 18) -> np.ndarray:
    """Features (h, w, C) of a disc on a different background, with noise in both."""
    ground, disc = np.random.default_rng(99).standard_normal((2, CHANNELS)) * 3
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    inside = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (height / 3) ** 2
    return np.where(inside[..., None], disc, ground) + random.standard_normal((height, width, CHANNELS)) * 0.2


@pytest.fixture
def palette() -> Palette:
    return Palette([field(), field(1) + 1])


@pytest.mark.parametrize("kind", TITLES)
def test_every_kind_gives_a_picture_of_the_grid(kind: str, palette: Palette) -> None:
    picture = palette.colours(kind, field())
    assert picture.shape == (14, 18, 3) and picture.dtype == np.uint8
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 1


@pytest.mark.parametrize("kind", TITLES)
def test_colours_do_not_depend_on_other_maps_drawn(kind: str) -> None:
    """Videos rely on it: the same features have the same colours in every frame."""
    whole = Palette([field(), field(1)])
    first = whole.colours(kind, field())
    whole.colours(kind, field(1))
    assert (whole.colours(kind, field()) == first).all()


@pytest.mark.parametrize("kind", TITLES)
def test_permuted_patches_get_the_same_colours_patch_for_patch(kind: str) -> None:
    if kind.startswith("foreground"):  # the border decides the foreground, so mirror instead
        shown, order = field()[:, ::-1], np.arange(14 * 18).reshape(14, 18)[:, ::-1].ravel()
    else:
        order = np.random.default_rng(0).permutation(14 * 18)
        shown = field().reshape(-1, CHANNELS)[order].reshape(14, 18, CHANNELS)
    straight = Palette([field()]).colours(kind, field()).reshape(-1, 3)[order]
    assert (Palette([shown]).colours(kind, shown).reshape(-1, 3) == straight).all()


@pytest.mark.parametrize("kind", ["pca", "kmeans", "norm", "first", "second", "third"])
def test_each_half_of_a_field_of_two_values_has_one_colour(kind: str) -> None:
    two = np.zeros((6, 8, CHANNELS))
    two[:, 4:] = np.arange(CHANNELS) + 1
    picture = Palette([two]).colours(kind, two)
    assert (picture[:, :4] == picture[0, 0]).all() and (picture[:, 4:] == picture[0, 7]).all()
    contrast = np.abs(picture[0, 0].astype(int) - picture[0, 7]).max()
    assert contrast <= 1 if kind in ("second", "third") else contrast > 50  # two values differ in one direction


@pytest.mark.parametrize("kind", TITLES)
@pytest.mark.parametrize("value", [0.0, 7.0])
def test_equal_features_get_one_colour(kind: str, value: float) -> None:
    flat = np.full((5, 6, CHANNELS), value)
    picture = Palette([flat]).colours(kind, flat)
    assert (picture == picture[0, 0]).all()


@pytest.mark.parametrize("kind", TITLES)
def test_constant_channel_does_not_hide_the_others(kind: str) -> None:
    constant = field()
    constant[..., 3] = 100.0
    assert len(np.unique(Palette([constant]).colours(kind, constant).reshape(-1, 3), axis=0)) > 1


def test_foreground_is_the_object_away_from_the_border() -> None:
    for flip in (1, -1):  # for both signs of the first component
        mask = Foreground.fit(flip * field()).mask(flip * field())
        y, x = np.mgrid[:14, :18]
        inside = (y - 7) ** 2 + (x - 9) ** 2 < (14 / 3) ** 2
        assert (mask == inside).all()


def test_the_background_of_foreground_components_is_black(palette: Palette) -> None:
    picture, mask = palette.colours("foreground-pca", field()), palette.foreground.mask(field())
    assert (picture[~mask] == 0).all() and (picture[mask].max(-1) > 0).any()


def test_error_for_an_unknown_kind_lists_the_kinds(palette: Palette) -> None:
    with pytest.raises(ValueError, match="unknown kind of map 'pac'; choose from pca, kmeans"):
        palette.colours("pac", field())


def test_palette_without_maps_is_rejected() -> None:
    with pytest.raises(ValueError, match="at least one feature map"):
        Palette([])


@pytest.mark.parametrize("kind", sorted(set(TITLES) - {"norm"}))
def test_other_number_of_channels_is_rejected(kind: str, palette: Palette) -> None:
    with pytest.raises(ValueError, match="fitted on 12 channels"):
        palette.colours(kind, np.ones((4, 4, 5)))


def test_norms_of_another_number_of_channels_have_colours(palette: Palette) -> None:
    assert palette.colours("norm", np.ones((4, 4, 5))).shape == (4, 4, 3)


def test_large_maps_are_subsampled_and_keep_their_borders() -> None:
    rows = np.arange(400, dtype=np.float32)[:, None, None].repeat(400, 1).repeat(2, 2)
    palette = Palette([rows, rows])
    kept = palette._maps[0]
    assert sum(one.shape[0] * one.shape[1] for one in palette._maps) <= ENOUGH * 1.01
    assert (kept[0] == 0).all() and (kept[-1] == 399).all()


def test_a_file_gives_the_same_colours(palette: Palette, tmp_path: Path) -> None:
    write_palette(palette, tmp_path / "p.safetensors")
    again = read_palette(tmp_path / "p.safetensors")
    for kind in TITLES:
        assert (again.colours(kind, field(5)) == palette.colours(kind, field(5))).all()


def test_a_palette_of_another_backbone_is_refused(tmp_path: Path) -> None:
    one, other = backbone(), backbone(share=0.5)
    maps = [np.random.default_rng(0).standard_normal((6, 6, one.embed_dim))]
    write_palette(Palette(maps, backbone=describe(one)), tmp_path / "p.safetensors")
    read_palette(tmp_path / "p.safetensors", one)
    with pytest.raises(FormatError, match="valid for one backbone only"):
        read_palette(tmp_path / "p.safetensors", other)


def test_files_that_are_not_palettes_are_rejected(palette: Palette, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(FormatError, match="no such palette"):
        read_palette(path)
    path.write_text("not one")
    with pytest.raises(FormatError, match="not a palette, or damaged"):
        read_palette(path)
    save_file({"x": np.ones(3)}, path)
    with pytest.raises(FormatError, match="not a palette"):
        read_palette(path)
    with pytest.raises(FormatError, match=r"\.safetensors"):
        write_palette(palette, tmp_path / "p.png")


@pytest.mark.parametrize("damage", ["missing", "shape", "nan"])
def test_a_damaged_palette_is_refused(damage: str, palette: Palette, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    write_palette(palette, path)
    tensors = load_file(path)
    if damage == "missing":
        del tensors["clusters.centres"]
    else:
        tensors["basis.low"] = np.zeros(2) if damage == "shape" else np.full(3, np.nan)
    save_file(tensors, path, metadata={KEY: '{"format": "denoising-vit/palette", "format_version": 1}'})
    with pytest.raises(FormatError, match="damaged palette"):
        read_palette(path)
    save_file(tensors, path, metadata={KEY: '{"format": "denoising-vit/palette"}'})
    with pytest.raises(FormatError, match="format_version missing"):
        read_palette(path)
    save_file(tensors, path, metadata={KEY: '{"format": "denoising-vit/palette", "format_version": 9}'})
    with pytest.raises(FormatError, match="upgrade denoising-vit"):
        read_palette(path)
