"""Crops: rendered pixels and their positions in the image, computed in three ways that must agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from denoising_vit.views.crops import Crop
from denoising_vit.views.plan import ViewPlan
from denoising_vit.views.sampling import at_patches

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
PLAIN: tuple[tuple[float, ...], tuple[float, ...]] = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
TURNS = [(False, False), (True, False), (False, True), (True, True)]

turned = pytest.mark.parametrize(("flip", "inverted"), TURNS)


def coordinates(height: int, width: int) -> Tensor:
    """A picture (3, H, W) with x and y of its pixel centres in [0, 1] as the first two channels."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y, x * 0])


def coordinate_nodes(rows: int, columns: int) -> Tensor:
    """The same coordinates as a field (Ry, Rx, 2) on nodes."""
    return coordinates(rows, columns)[:2].permute(1, 2, 0).double()


def noise(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


# --- neutral crops ---


def test_field_sampled_at_an_inverted_crop_is_rotated_like_its_picture() -> None:
    crop = next(c for c in (Crop.neutral(n, (56, 56), 0) for n in range(8)) if c.inverted)
    field = noise(14, 14, 3).double()
    view = ViewPlan(np.array([crop.box]), np.array([False]), crop.size, 8, 8, (14, 14))
    assert torch.allclose(crop.sample(field, 8, 8), at_patches(field, view).flip((0, 1)), atol=1e-12)
    assert not torch.allclose(crop.sample(field, 8, 8), at_patches(field, view))


def test_neutral_crops_are_distinct_squares_inside_the_photo() -> None:
    crops = [Crop.neutral(n, (56, 56), 0) for n in range(50)]
    boxes = np.array([crop.box for crop in crops])
    assert boxes.min() >= 0 and boxes.max() <= 1
    assert np.allclose(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    assert len({crop.box for crop in crops}) == 50
    inverted = [crop.inverted for crop in crops[:8]]
    assert sum(inverted) == sum(inverted[::2]) * 2 == 4  # in both halves of the photos
    assert not any(crop.flip or any(crop.pads) for crop in crops)


def test_rendered_crop_matches_the_sampled_field() -> None:
    """In a picture of coordinates, the mean colour of a patch is the position of its centre."""
    image, nodes = coordinates(224, 224), coordinate_nodes(28, 28)
    for number in range(4):
        crop = Crop.neutral(number, (56, 56), 0)
        pooled = torch.nn.functional.avg_pool2d(crop.render(image, *PLAIN), 8)[:2].permute(1, 2, 0)
        inner = slice(1, -1)
        assert torch.allclose(pooled[inner, inner].double(), crop.sample(nodes, 8, 8)[inner, inner], atol=0.01)


def test_neutral_crop_depends_on_number_and_seed_not_on_size() -> None:
    assert Crop.neutral(3, (56, 40), 5) == Crop.neutral(3, (56, 40), 5)
    assert Crop.neutral(3, (56, 40), 5).box != Crop.neutral(3, (56, 40), 6).box
    assert Crop.neutral(3, (56, 40), 5).box == Crop.neutral(3, (112, 112), 5).box  # for any rendered size


# --- rendering and sampling agree ---


@turned
@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (3, 0, 1, 4), (0, 8, 8, 0)])
@pytest.mark.parametrize(("patch", "stride"), [(5, 4), (5, 2), (1, 1)])
def test_patches_off_the_pads_are_sampled_where_they_are_shown(
    flip: bool, inverted: bool, pads: tuple[int, int, int, int], patch: int, stride: int
) -> None:
    """Sides are primes, and the crop is off centre in every direction."""
    crop = Crop((0.12, 0.3, 0.83, 0.71), (53, 37), pads, flip, inverted)
    shown = crop.render(coordinates(97, 89), *PLAIN)
    assert tuple(shown.shape[1:]) == crop.padded == (53 + pads[1] + pads[3], 37 + pads[0] + pads[2])
    pooled = torch.nn.functional.avg_pool2d(shown, patch, stride)[:2].permute(1, 2, 0).double()
    sampled = crop.sample(coordinate_nodes(41, 43), patch, stride)
    assert sampled.shape == pooled.shape
    inside = torch.nn.functional.pad(torch.ones(1, *crop.size), (pads[0], pads[2], pads[1], pads[3]))
    whole = torch.nn.functional.avg_pool2d(inside, patch, stride)[0] == 1  # no overlap with the pads
    assert whole.sum() > 50
    assert torch.allclose(pooled[whole], sampled[whole], atol=1e-3)


@turned
def test_pads_are_exactly_zero_and_nothing_else_is(flip: bool, inverted: bool) -> None:
    crop = Crop((0.1, 0.2, 0.9, 0.8), (11, 13), (2, 3, 5, 7), flip, inverted)
    shown = crop.render(0.9 * torch.ones(3, 31, 29), MEAN, STD)
    assert shown.shape == (3, 21, 20)
    inner = shown[:, 3:14, 2:15]
    assert (inner != 0).all()
    assert int((shown != 0).sum()) == inner.numel()


def test_pads_do_not_change_the_picture_between_them() -> None:
    crop = Crop((0.1, 0.2, 0.9, 0.8), (11, 13), flip=True, inverted=True)
    image = noise(3, 31, 29)
    padded = replace(crop, pads=(2, 3, 5, 7)).render(image, MEAN, STD)
    assert torch.equal(padded[:, 3:14, 2:15], crop.render(image, MEAN, STD))


@turned
def test_flip_and_inversion_turn_the_picture(flip: bool, inverted: bool) -> None:
    image = noise(3, 31, 29)
    upright = Crop((0.1, 0.2, 0.9, 0.8), (11, 13))
    expected = upright.render(image, MEAN, STD)
    expected = expected.flip(2) if flip else expected
    expected = expected.flip((1, 2)) if inverted else expected
    assert torch.allclose(replace(upright, flip=flip, inverted=inverted).render(image, MEAN, STD), expected, atol=1e-5)


def test_colours_change_before_normalisation_and_pads_stay_zero() -> None:
    crop = Crop((0.0, 0.0, 1.0, 1.0), (5, 7), (1, 0, 0, 0))
    shown = crop.render(torch.full((3, 5, 7), 0.25), MEAN, STD, lambda pixels: 1 - pixels)
    assert torch.equal(shown[:, :, 0], torch.zeros(3, 5))
    expected = [(0.75 - mean) / std for mean, std in zip(MEAN, STD, strict=True)]
    assert shown[:, 2, 3].tolist() == pytest.approx(expected, abs=1e-5)


def test_whole_image_at_its_own_size_is_shown_unchanged() -> None:
    image = noise(3, 13, 17)
    shown = Crop.whole((13, 17)).render(image, MEAN, STD)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    assert torch.allclose(shown, (image - mean) / std, atol=1e-4)


# --- pixels and places ---


@pytest.mark.parametrize(
    ("flip", "inverted", "rows", "columns"),
    [
        (False, False, [1, 3, -1], [-1, 1, 3, 5, 7]),
        (True, False, [1, 3, -1], [-1, 7, 5, 3, 1]),
        (False, True, [3, 1, -1], [-1, 7, 5, 3, 1]),
        (True, True, [3, 1, -1], [-1, 1, 3, 5, 7]),
    ],
)
def test_pixels_by_hand(flip: bool, inverted: bool, rows: list[int], columns: list[int]) -> None:
    """4 x 8 pixels rendered as 2 x 4, with a pad on the left and one below."""
    found = Crop((0.0, 0.0, 1.0, 1.0), (2, 4), (1, 0, 0, 1), flip, inverted).pixels(4, 8)
    assert [values.tolist() for values in found] == [rows, columns]


@turned
def test_places_by_hand(flip: bool, inverted: bool) -> None:
    rows, columns = Crop((0.0, 0.0, 1.0, 1.0), (2, 4), (1, 0, 0, 1), flip, inverted).places(4, 8)
    down, across = [0.25, 0.75, 1.25, 1.75], [1.25, 1.75, 2.25, 2.75, 3.25, 3.75, 4.25, 4.75]
    assert rows.tolist() == pytest.approx(down[::-1] if inverted else down)
    assert columns.tolist() == pytest.approx(across[::-1] if flip != inverted else across)


def test_pixels_outside_the_box_have_no_place() -> None:
    """The crop is the middle half of the lower half; each pixel is shown twice as large."""
    crop = Crop((0.25, 0.5, 0.75, 1.0), (4, 4))
    rows, columns = crop.places(4, 4)
    assert np.isnan(rows).tolist() == [True, True, False, False]
    assert np.isnan(columns).tolist() == [True, False, False, True]
    assert rows[2:].tolist() == columns[1:3].tolist() == [1.0, 3.0]
    assert [values.tolist() for values in crop.pixels(4, 4)] == [[2, 2, 3, 3], [1, 1, 2, 2]]


@turned
def test_pixels_and_places_are_inverse_to_each_other(flip: bool, inverted: bool) -> None:
    """Rendered at the image's own scale: 29 of 47 rows and 31 of 53 columns."""
    crop = Crop((11 / 53, 7 / 47, 42 / 53, 36 / 47), (29, 31), (2, 3, 5, 7), flip, inverted)
    for pixels, places, shown, before in zip(
        crop.pixels(47, 53), crop.places(47, 53), crop.size, (crop.pads[1], crop.pads[0]), strict=True
    ):
        inside = np.flatnonzero(pixels >= 0)
        assert inside.tolist() == list(range(before, before + shown))
        assert np.allclose(places[pixels[inside]], inside + 0.5)
        there = np.flatnonzero(~np.isnan(places))
        assert pixels[np.floor(places[there]).astype(int)].tolist() == there.tolist()


@turned
@pytest.mark.parametrize("size", [(61, 17), (17, 61)])
def test_pixels_are_the_nearest_at_any_scale(flip: bool, inverted: bool, size: tuple[int, int]) -> None:
    crop = Crop((0.13, 0.21, 0.77, 0.94), size, (2, 3, 5, 7), flip, inverted)
    spans = crop.box[3] - crop.box[1], crop.box[2] - crop.box[0]
    counts = 97, 89
    for pixels, places, side, span, count in zip(
        crop.pixels(*counts), crop.places(*counts), size, spans, counts, strict=True
    ):
        inside = np.flatnonzero(pixels >= 0)
        assert len(inside) == side
        away = np.abs(places[pixels[inside]] - (inside + 0.5))
        away = away[~np.isnan(away)]  # without pixels whose centre is just outside the box
        assert len(away) >= side - 2
        assert away.max() <= side / (span * count) / 2 + 1e-9


@turned
def test_pixels_match_the_rendered_picture(flip: bool, inverted: bool) -> None:
    image = noise(3, 23, 19)
    crop = Crop((0.0, 0.0, 1.0, 1.0), (23, 19), (2, 0, 1, 3), flip, inverted)
    rows, columns = crop.pixels(23, 19)
    down, across = rows >= 0, columns >= 0
    shown = crop.render(image, *PLAIN).numpy()[:, down][:, :, across]
    assert np.allclose(shown, image.numpy()[:, rows[down]][:, :, columns[across]], atol=1e-5)


# --- crops as separate images ---


@turned
def test_cut_matches_the_rendered_picture_without_resampling(flip: bool, inverted: bool) -> None:
    pixels = (255 * noise(23, 31, 3)).to(torch.uint8).numpy()
    crop = Crop((5 / 31, 2 / 23, 16 / 31, 19 / 23), (17, 11), flip=flip, inverted=inverted)
    cut = crop.cut(pixels)
    assert cut.shape == (17, 11, 3)
    assert np.array_equal(cut[0, 0], pixels[18 if inverted else 2, 15 if flip != inverted else 5])
    rendered = crop.render(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, *PLAIN)
    assert torch.allclose(rendered, torch.from_numpy(cut.copy()).permute(2, 0, 1).float() / 255, atol=1e-5)


def test_snapped_box_has_whole_pixels_and_moves_at_most_half_a_pixel() -> None:
    for number in range(40):
        crop = Crop.neutral(number, (56, 56), 0)
        snapped = crop.snapped(31, 47)
        in_pixels = np.array(snapped.box) * [47, 31, 47, 31]
        assert np.allclose(in_pixels, in_pixels.round())
        assert np.abs(in_pixels - np.array(crop.box) * [47, 31, 47, 31]).max() <= 0.5 + 1e-9
        assert (snapped.size, snapped.inverted) == (crop.size, crop.inverted)
        assert snapped.snapped(31, 47) == snapped


def test_box_smaller_than_a_pixel_keeps_one_pixel() -> None:
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    crop = Crop((0.999, 0.999, 1.0, 1.0), (8, 8)).snapped(4, 4)
    assert crop.box == (0.75, 0.75, 1.0, 1.0)
    assert np.array_equal(crop.cut(pixels), pixels[3:, 3:])
