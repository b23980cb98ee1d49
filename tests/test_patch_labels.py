"""Labels of patches: counts by hand, and that no pixel is lost or counted twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from denoising_vit.evaluation.masks import NO_LABEL
from denoising_vit.evaluation.patches import commonest, patch_counts
from denoising_vit.views.crops import Crop

#: 4 x 4 pixels of three classes.
LABELS = torch.tensor([[0, 0, 1, 1], [0, 1, 1, -1], [2, 2, -1, -1], [2, 0, -1, 1]])

#: Counts of each quarter: classes 0, 1, 2, and no label.
QUARTERS = [[[3, 1, 0, 0], [0, 3, 0, 1]], [[1, 0, 3, 0], [0, 1, 0, 3]]]

TURNS = [(False, False), (True, False), (False, True), (True, True)]
turned = pytest.mark.parametrize(("flip", "inverted"), TURNS)


def random_labels(height: int, width: int, classes: int) -> Tensor:
    return torch.randint(-1, classes, (height, width), generator=torch.Generator().manual_seed(0))


def inside(crop: Crop, labels: Tensor) -> Tensor:
    """Labels of the pixels whose centre lies in the crop's box, computed in another way than in the code."""
    x0, y0, x1, y1 = crop.box
    height, width = labels.shape
    rows = [row for row in range(height) if y0 < (row + 0.5) / height < y1]
    columns = [column for column in range(width) if x0 < (column + 0.5) / width < x1]
    return labels[rows][:, columns]


def one_by_one(labels: Tensor, crop: Crop, classes: int, patch: int, stride: int) -> np.ndarray:
    """Slow reference: every pixel counts for the patch with the nearest centre, the later one of two."""
    h, w = ((side - patch) // stride + 1 for side in crop.padded)
    counts = np.zeros((h, w, classes + 1), int)
    x0, y0, x1, y1 = crop.box
    height, width = labels.shape

    def nearest(place: float, count: int) -> int:
        distances = [abs(number * stride + patch / 2 - place) for number in range(count)]
        return max(number for number in range(count) if distances[number] < min(distances) + 1e-9)

    for row in range(height):
        for column in range(width):
            y, x = ((row + 0.5) / height - y0) / (y1 - y0), ((column + 0.5) / width - x0) / (x1 - x0)
            if not (0 < y < 1 and 0 < x < 1):
                continue
            y, x = (1 - y if crop.inverted else y), (1 - x if crop.flip != crop.inverted else x)
            cell = nearest(y * crop.size[0] + crop.pads[1], h), nearest(x * crop.size[1] + crop.pads[0], w)
            label = int(labels[row, column])
            counts[*cell, classes if label == NO_LABEL else label] += 1
    return counts


@pytest.mark.parametrize("scale", [1, 2, 5])
def test_counts_by_hand(scale: int) -> None:
    """Pixels of the mask are counted, at whatever size the image is shown."""
    counts = patch_counts(LABELS, Crop.whole((4 * scale, 4 * scale)), 3, 2 * scale, 2 * scale)
    assert counts.tolist() == QUARTERS
    assert counts.dtype == torch.int64


@turned
def test_counts_are_flipped_and_inverted_with_the_image(flip: bool, inverted: bool) -> None:
    expected = torch.tensor(QUARTERS)
    expected = expected.flip(1) if flip else expected
    expected = expected.flip((0, 1)) if inverted else expected
    crop = Crop((0.0, 0.0, 1.0, 1.0), (4, 4), flip=flip, inverted=inverted)
    assert patch_counts(LABELS, crop, 3, 2, 2).tolist() == expected.tolist()


def test_crop_counts_only_the_pixels_that_it_shows() -> None:
    """The lower right quarter, one pixel per patch; a pad of one patch on the left has no counts."""
    counts = patch_counts(LABELS, Crop((0.5, 0.5, 1.0, 1.0), (4, 4), pads=(2, 0, 0, 0)), 3, 2, 2)
    assert counts.tolist() == [[[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]], [[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]]
    assert commonest(counts).tolist() == [[NO_LABEL, NO_LABEL, NO_LABEL], [NO_LABEL, NO_LABEL, 1]]


def test_overlapping_patches_count_pixels_by_the_nearest_centre() -> None:
    """Sides of 7, patches of 3 with stride 2: centres at 1.5, 3.5 and 5.5; 2.5 and 4.5 go to the second."""
    counts = patch_counts(torch.zeros(7, 7, dtype=torch.int64), Crop.whole((7, 7)), 1, 3, 2)
    assert counts[..., 0].tolist() == [[4, 4, 6], [4, 4, 6], [6, 6, 9]]


@turned
@pytest.mark.parametrize(
    ("size", "patch", "stride", "pads"),
    [
        ((12, 8), 4, 4, (0, 0, 0, 0)),
        ((13, 9), 5, 4, (0, 0, 0, 0)),
        ((11, 17), 3, 2, (0, 0, 0, 0)),
        ((11, 17), 3, 2, (2, 4, 6, 8)),
        ((84, 56), 14, 7, (0, 0, 0, 0)),
    ],
)
def test_every_pixel_that_is_shown_counts_once(
    flip: bool, inverted: bool, size: tuple[int, int], patch: int, stride: int, pads: tuple[int, int, int, int]
) -> None:
    labels = random_labels(23, 19, 5)
    crop = Crop((0.07, 0.11, 0.83, 0.97), size, pads, flip, inverted)
    counts = patch_counts(labels, crop, 5, patch, stride)
    assert tuple(counts.shape[:2]) == tuple((side - patch) // stride + 1 for side in crop.padded)
    shown = inside(crop, labels)
    assert 0 < shown.numel() < labels.numel()
    expected = [int((shown == k).sum()) for k in (*range(5), NO_LABEL)]
    assert counts.sum((0, 1)).tolist() == expected
    assert counts.tolist() == one_by_one(labels, crop, 5, patch, stride).tolist()


@pytest.mark.parametrize("number", range(4))
def test_every_pixel_of_a_neutral_crop_counts_once(number: int) -> None:
    labels = random_labels(61, 53, 4)
    crop = Crop.neutral(number, (29, 29), 0)
    counts = patch_counts(labels, crop, 4, 5, 3)
    shown = inside(crop, labels)
    assert counts.sum((0, 1)).tolist() == [int((shown == k).sum()) for k in (0, 1, 2, 3, NO_LABEL)]
    assert counts.tolist() == one_by_one(labels, crop, 4, 5, 3).tolist()


def test_the_commonest_class() -> None:
    counts = torch.tensor([[[3, 1, 0, 0], [1, 3, 0, 0], [0, 1, 5, 4]]])
    assert commonest(counts).tolist() == [[0, 1, 2]]


def test_a_patch_mostly_without_labels_has_none() -> None:
    assert commonest(torch.tensor([[[1, 0, 0, 3], [0, 0, 0, 4]]])).tolist() == [[NO_LABEL, NO_LABEL]]


def test_first_of_equally_common_classes_is_taken() -> None:
    assert commonest(torch.tensor([[[0, 2, 2, 0], [2, 0, 2, 0], [2, 2, 2, 2]]])).tolist() == [[1, 0, 0]]


def test_half_unlabelled_patch_keeps_its_label() -> None:
    assert commonest(torch.tensor([[[0, 2, 0, 2]]])).tolist() == [[1]]


def test_patch_without_pixels_has_no_label() -> None:
    """One pixel shown over nine patches counts for one of them."""
    counts = patch_counts(torch.zeros(1, 1, dtype=torch.int64), Crop.whole((6, 6)), 1, 2, 2)
    assert int(counts.sum()) == 1
    assert sorted(commonest(counts).flatten().tolist()) == [NO_LABEL] * 8 + [0]
