"""Random crops and colour distortion: distributions, alignment of pixels and labels, and ranges of colours."""

from __future__ import annotations

import colorsys
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.evaluation.masks import NO_LABEL
from denoising_vit.evaluation.segmentation import PAPER
from denoising_vit.evaluation.segmentation.samples import distort, labels_of, training_crop
from denoising_vit.views.crops import Crop

pytestmark = pytest.mark.usefixtures("one_thread")

#: The published protocol at an eighth of its size: crops of 64 pixels become 70 with patches of 14.
SMALL = replace(PAPER, short_side=64, long_side=256, crop=64, window=64, window_stride=43)
PLAIN = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def mixed_labels(height: int, width: int, seed: int = 0) -> Tensor:
    """Blocks of 8 x 8 pixels of classes 0, 1 and 2."""
    blocks = np.random.default_rng(seed).integers(3, size=(height // 8 + 1, width // 8 + 1))
    return torch.from_numpy(np.kron(blocks, np.ones((8, 8), dtype=np.int64))[:height, :width])


def picture_of(labels: Tensor) -> Tensor:
    """Red, green and blue for classes 0, 1 and 2: (3, H, W)."""
    return torch.stack([labels == 0, labels == 1, labels == 2]).float()


def crops(labels: Tensor, count: int, patch: tuple[int, int] = (14, 14)) -> list[Crop]:
    return [training_crop(labels, SMALL, patch, np.random.default_rng([1, number])) for number in range(count)]


@pytest.mark.parametrize(("patch", "padded"), [((14, 14), 70), ((16, 16), 64), ((14, 7), 70), ((6, 4), 66)])
def test_crops_lie_within_the_image_and_are_padded_to_whole_patches(patch: tuple[int, int], padded: int) -> None:
    labels = mixed_labels(80, 111)
    before = (padded - 64) // 2
    for crop in crops(labels, 60, patch):
        x0, y0, x1, y1 = crop.box
        assert 0 <= x0 < x1 <= 1 + 1e-9
        assert 0 <= y0 < y1 <= 1 + 1e-9
        assert max(crop.size) <= 64
        assert crop.padded == (padded, padded)
        assert crop.pads[:2] == (before, before)
        assert not crop.inverted


@pytest.mark.parametrize(("patch", "padded"), [(14, 518), (16, 512)])
def test_published_crops_are_padded_to_whole_patches(patch: int, padded: int) -> None:
    labels = mixed_labels(375, 500)
    whole = replace(PAPER, scale=(1.0, 1.0))
    crop = training_crop(labels, whole, (patch, patch), np.random.default_rng(0))
    before = (padded - 512) // 2
    assert (crop.size, crop.padded, crop.pads) == ((512, 512), (padded, padded), (before,) * 4)
    half = replace(PAPER, scale=(0.5, 0.5))  # 256 x 341
    crop = training_crop(labels, half, (patch, patch), np.random.default_rng(0))
    assert (crop.size, crop.padded) == ((256, 341), (padded, padded))
    assert crop.pads == (before, before, before + 171, before + 256)


def test_scales_range_from_half_to_twice_and_keep_the_aspect_ratio() -> None:
    found = crops(mixed_labels(80, 120), 300)
    high = np.array(
        [crop.size[0] / (crop.box[3] - crop.box[1]) for crop in found]
    )  # height of the scaled image in pixels
    wide = np.array([crop.size[1] / (crop.box[2] - crop.box[0]) for crop in found])
    np.testing.assert_allclose(high, high.round(), atol=1e-6)
    np.testing.assert_allclose(wide, wide.round(), atol=1e-6)
    np.testing.assert_allclose(wide, high * 1.5, atol=1.3)  # both are rounded
    scale = high / 64
    assert 0.5 <= scale.min() < 0.52
    assert 1.98 < scale.max() <= 2
    assert np.histogram(scale, 3, (0.5, 2))[0] == pytest.approx([100, 100, 100], abs=30)


def test_small_images_are_padded_at_the_right_and_bottom() -> None:
    found = crops(mixed_labels(80, 120), 100)
    small = [crop for crop in found if crop.size[0] < 64]
    assert small
    assert len(small) < len(found)
    for crop in found:
        height, width = (round(part / span) for part, span in zip(crop.size, _spans(crop), strict=True))
        assert crop.size == (min(height, 64), min(width, 64))
        assert crop.pads == (3, 3, 3 + 64 - crop.size[1], 3 + 64 - crop.size[0])


def test_crops_are_spread_over_the_whole_image() -> None:
    found = [crop for crop in crops(mixed_labels(80, 120), 400) if crop.size == (64, 64)]
    starts = np.array([(crop.box[0], crop.box[1]) for crop in found])
    ends = np.array([(crop.box[2], crop.box[3]) for crop in found])
    assert (starts.min(0) < 0.02).all()
    assert (ends.max(0) > 0.98).all()
    assert np.mean(starts + ends, 0) == pytest.approx([1, 1], abs=0.1)


def test_flip_is_the_share_of_mirrored_crops() -> None:
    labels = mixed_labels(80, 80)
    assert np.mean([crop.flip for crop in crops(labels, 400)]) == pytest.approx(0.5, abs=0.08)
    never, always = replace(SMALL, flip=0.0), replace(SMALL, flip=1.0)
    for number in range(20):
        assert not training_crop(labels, never, (14, 14), np.random.default_rng(number)).flip
        assert training_crop(labels, always, (14, 14), np.random.default_rng(number)).flip


def test_crop_is_determined_by_the_generator() -> None:
    labels = mixed_labels(80, 111)
    first, again, other = (training_crop(labels, SMALL, (14, 14), np.random.default_rng(n)) for n in (5, 5, 6))
    assert first == again
    assert first != other


def test_labels_of_a_crop_are_those_of_the_nearest_pixels() -> None:
    labels = torch.arange(6 * 10).view(6, 10)
    # Columns 2 to 7 and rows 1 to 3, shown at twice their size.
    crop = Crop((0.2, 1 / 6, 0.8, 4 / 6), (6, 12), (1, 2, 3, 4))
    wanted = labels[1:4, 2:8].repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(labels_of(crop, labels), wanted)
    mirrored = replace(crop, flip=True)
    assert torch.equal(labels_of(mirrored, labels), wanted.flip(1))


def test_labels_of_a_crop_at_a_third_of_the_size() -> None:
    labels = torch.arange(9 * 12).view(9, 12)
    assert torch.equal(labels_of(Crop.whole((3, 4)), labels), labels[1::3, 1::3])


def test_labels_of_a_fractional_crop_follow_its_pixel_centres() -> None:
    labels = torch.arange(7 * 11).view(7, 11)
    box = (0.13, 0.21, 0.77, 0.93)
    rows = [int((0.21 + (row + 0.5) / 5 * 0.72) * 7) for row in range(5)]
    columns = [int((0.13 + (column + 0.5) / 4 * 0.64) * 11) for column in range(4)]
    assert torch.equal(labels_of(Crop(box, (5, 4), (0, 3, 2, 1)), labels), labels[rows][:, columns])


@pytest.mark.parametrize("patch", [(14, 14), (16, 16), (6, 4)])
def test_pixels_and_labels_are_aligned(patch: tuple[int, int]) -> None:
    labels = mixed_labels(61, 93)
    image = picture_of(labels)
    found = crops(labels, 40, patch)
    assert {crop.flip for crop in found} == {True, False}
    for crop in found:
        rendered, known = crop.render(image, *PLAIN), labels_of(crop, labels)
        left, top, right, bottom = crop.pads
        high, wide = crop.padded
        assert rendered.shape == (3, high, wide)
        assert known.shape == crop.size
        shown = rendered[:, top : high - bottom, left : wide - right]
        assert float(rendered.sum()) == pytest.approx(float(shown.sum()), rel=1e-5)  # pads are zero
        inside = _away_from_borders(known)
        assert inside.float().mean() > 0.2
        assert torch.equal(shown.argmax(0)[inside], known[inside])


def test_crops_are_redrawn_until_no_class_fills_three_quarters() -> None:
    # 16 columns of class 1: of the 33 positions of a crop, only 0 to 7 show it on more than a quarter.
    labels = torch.zeros(64, 64, dtype=torch.int64)
    labels[:, :16] = 1
    still = replace(SMALL, scale=(1.0, 1.0), crop=32, flip=0.0)
    found = [training_crop(labels, still, (16, 16), np.random.default_rng([2, number])) for number in range(600)]
    left = np.array([round(crop.box[0] * 64) for crop in found])
    assert np.mean(left < 8) == pytest.approx(1 - (1 - 8 / 33) ** 10, abs=0.04)  # 0.94: ten crops
    # Exactly three quarters is too much.
    assert np.mean(left == 8) < 0.02


def test_without_the_class_limit_crops_only_need_two_classes() -> None:
    labels = torch.zeros(64, 64, dtype=torch.int64)
    labels[:, :16] = 1
    still = replace(SMALL, scale=(1.0, 1.0), crop=32, flip=0.0, most=2.0)
    found = [training_crop(labels, still, (16, 16), np.random.default_rng([3, number])) for number in range(300)]
    left = np.array([round(crop.box[0] * 64) for crop in found])
    # Any crop with both classes is accepted; 16 of 33 have both.
    assert np.mean(left < 16) > 0.98
    assert np.mean(left < 8) == pytest.approx(0.5, abs=0.12)


def test_class_limit_counts_labelled_pixels_only() -> None:
    # 48 columns without a label, then two classes in alternating rows: one labelled column is enough for a crop.
    labels = torch.full((64, 64), NO_LABEL)
    labels[::2, 48:], labels[1::2, 48:] = 0, 1
    still = replace(SMALL, scale=(1.0, 1.0), crop=32, flip=0.0)
    found = [training_crop(labels, still, (16, 16), np.random.default_rng([4, number])) for number in range(200)]
    columns = np.array([round(crop.box[2] * 64) - 48 for crop in found])
    assert np.mean(columns > 0) > 0.97
    assert np.mean((columns >= 1) & (columns <= 8)) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("label", [0, 2, NO_LABEL])
def test_images_with_a_single_label_are_still_cropped(label: int) -> None:
    labels = torch.full((40, 50), label)
    for crop in crops(labels, 5):
        assert crop.padded == (70, 70)
        assert (labels_of(crop, labels) == label).all()


def test_distorted_colours_stay_within_bounds() -> None:
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    image[:, 0], image[:, 1] = 0, 1
    for number in range(60):
        found = distort(image, np.random.default_rng(number))
        assert found.shape == image.shape
        assert found.dtype == image.dtype
        assert float(found.min()) >= 0
        assert float(found.max()) <= 1


def test_distortion_is_reproducible_and_does_not_change_its_input() -> None:
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1))
    before = image.clone()
    for number in range(20):
        first, again = (distort(image, np.random.default_rng(number)) for _ in range(2))
        assert torch.equal(first, again)
    assert torch.equal(image, before)


def test_each_distortion_is_applied_independently_half_the_time() -> None:
    # Two grays determine brightness and contrast, a colour determines saturation and hue; no value reaches 0 or 1.
    image = torch.tensor([[0.2, 0.2, 0.2], [0.3, 0.3, 0.3], [0.2, 0.25, 0.3]]).T[:, None]  # (3, 1, 3)
    hue_before = colorsys.rgb_to_hsv(0.2, 0.25, 0.3)[0]
    found = []
    for number in range(600):
        dark, light, colour = distort(image, np.random.default_rng([7, number]))[:, 0].T.double().tolist()
        contrast = (light[0] - dark[0]) / 0.1
        brightness = dark[0] / contrast - 0.2
        saturation = (max(colour) - min(colour)) / 0.1 / contrast
        hue = colorsys.rgb_to_hsv(*colour)[0] - hue_before
        found.append((brightness, contrast - 1, saturation - 1, hue))
    change = np.array(found)
    acted = np.abs(change) > 1e-4
    np.testing.assert_allclose(acted.mean(0), 0.5, atol=0.08)
    for number, most in enumerate((32 / 255, 0.5, 0.5, 18 / 180)):
        changes = change[acted[:, number], number]
        assert -most - 1e-4 < changes.min() < -0.9 * most
        assert 0.9 * most < changes.max() < most + 1e-4
        assert abs(changes.mean()) < 0.15 * most
    combinations = [(acted == pattern).all(1).mean() for pattern in itertools.product((False, True), repeat=4)]
    np.testing.assert_allclose(combinations, 1 / 16, atol=0.04)  # one of them changes nothing


def test_colours_can_stay_unchanged() -> None:
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(2))
    assert any(torch.equal(distort(image, np.random.default_rng(number)), image) for number in range(100))


def test_colours_change_pixel_by_pixel() -> None:
    image = torch.rand(3, 12, 10, generator=torch.Generator().manual_seed(3))
    for number in range(20):
        plain, mirrored = (distort(shown, np.random.default_rng(number)) for shown in (image, image.flip(2, 1)))
        torch.testing.assert_close(mirrored.flip(2, 1), plain)
        part = distort(image[:, 2:7, 3:5], np.random.default_rng(number))
        torch.testing.assert_close(part, plain[:, 2:7, 3:5])


def test_pads_are_zero_after_normalisation_whatever_the_colours() -> None:
    labels = mixed_labels(64, 64)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    small = replace(SMALL, scale=(0.5, 0.5))
    crop = training_crop(labels, small, (14, 14), np.random.default_rng(0))
    assert crop.size == (32, 32)
    rendered = crop.render(picture_of(labels), mean, std, lambda image: image * 0 + 0.25)
    wanted = F.pad(
        torch.tensor([(0.25 - m) / s for m, s in zip(mean, std, strict=True)])[:, None, None].expand(3, 32, 32),
        (3, 35, 3, 35),
    )
    torch.testing.assert_close(rendered, wanted)


def _spans(crop: Crop) -> tuple[float, float]:
    x0, y0, x1, y1 = crop.box
    return y1 - y0, x1 - x0


def _away_from_borders(labels: Tensor) -> Tensor:
    """True where the surrounding 3 x 3 pixels have the same label."""
    padded = F.pad(labels[None, None].float(), (1, 1, 1, 1), mode="replicate")
    return (F.max_pool2d(padded, 3, 1) == -F.max_pool2d(-padded, 3, 1))[0, 0]
