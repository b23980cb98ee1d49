"""J and F, compared with loops over pixels, dilation by scikit-image, and cases counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from skimage.morphology import dilation, disk

from denoising_vit.evaluation.correspondence.label_propagation import boundary, contour_accuracy, region_similarity


def blobs(seed: int, height: int = 23, width: int = 31) -> np.ndarray:
    """A few rectangles, some across the border, with holes."""
    chance = np.random.default_rng(seed)
    mask = np.zeros((height, width), dtype=bool)
    for _ in range(4):
        y, x = chance.integers(-4, height), chance.integers(-4, width)
        mask[max(y, 0) : y + 9, max(x, 0) : x + 11] ^= True
    return mask


def by_loops(mask: np.ndarray) -> set[tuple[int, int]]:
    """Pixels whose right, lower or lower right neighbour exists and has another value."""
    height, width = mask.shape
    found = set()
    for y in range(height):
        for x in range(width):
            around = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            if any(v < height and u < width and mask[v, u] != mask[y, x] for v, u in around):
                found.add((y, x))
    return found


def f_by_loops(truth: np.ndarray, found: np.ndarray, radius: int) -> float:
    ours, theirs = by_loops(found), by_loops(truth)
    if not ours or not theirs:
        return float(len(ours) == len(theirs))

    def share(some: set[tuple[int, int]], others: set[tuple[int, int]]) -> float:
        near = [any(math.dist(one, other) <= radius for other in others) for one in some]
        return sum(near) / len(near)

    precision, recall = share(ours, theirs), share(theirs, ours)
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("seed", range(6))
def test_j_matches_loops(seed: int) -> None:
    truth, found = blobs(seed), blobs(seed + 100)
    both = sum(bool(a and b) for a, b in zip(truth.flat, found.flat, strict=True))
    either = sum(bool(a or b) for a, b in zip(truth.flat, found.flat, strict=True))
    assert region_similarity(truth, found) == both / either
    void = blobs(seed + 200)
    both = sum(bool(a and b and not v) for a, b, v in zip(truth.flat, found.flat, void.flat, strict=True))
    either = sum(bool((a or b) and not v) for a, b, v in zip(truth.flat, found.flat, void.flat, strict=True))
    assert region_similarity(truth, found, void) == both / either


def test_j_by_hand() -> None:
    truth, found = np.zeros((10, 10), bool), np.zeros((10, 10), bool)
    assert region_similarity(truth, found) == 1
    truth[2:6, 2:6] = True
    assert region_similarity(truth, found) == 0 and region_similarity(truth, truth) == 1
    found[4:8, 2:6] = True
    assert region_similarity(truth, found) == 8 / 24
    assert region_similarity(truth, found, truth | found) == 1


@pytest.mark.parametrize("seed", range(6))
def test_boundaries_match_loops(seed: int) -> None:
    """Including the last row and column."""
    for mask in (blobs(seed), blobs(seed, 5, 7), ~blobs(seed)):
        assert {(int(y), int(x)) for y, x in zip(*np.nonzero(boundary(mask)), strict=True)} == by_loops(mask)


@pytest.mark.parametrize("bound", [0.008, 0.05, 0.1])
@pytest.mark.parametrize("seed", range(4))
def test_f_matches_loops(seed: int, bound: float) -> None:
    truth, found = blobs(seed), blobs(seed + 100)
    radius = math.ceil(bound * math.hypot(23, 31))
    assert contour_accuracy(truth, found, bound=bound) == pytest.approx(f_by_loops(truth, found, radius), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_f_matches_dilation_by_a_disk_at_davis_size(seed: int) -> None:
    truth, found = np.kron(blobs(seed), np.ones((20, 27), bool)), np.kron(blobs(seed + 9), np.ones((20, 27), bool))
    found = np.roll(truth, (6, 9), (0, 1)) | (found & truth)
    ours, theirs = boundary(found), boundary(truth)
    around = disk(math.ceil(0.008 * math.hypot(*truth.shape)))
    precision = (ours & dilation(theirs, around)).sum() / ours.sum()
    recall = (theirs & dilation(ours, around)).sum() / theirs.sum()
    expected = 2 * precision * recall / (precision + recall)
    assert 0.1 < expected < 0.99
    assert contour_accuracy(truth, found) == pytest.approx(expected, abs=1e-12)


def test_f_by_hand() -> None:
    """In 20 x 20 pixels contours agree within 1 pixel: 0.008 of 28.3, rounded up."""
    truth = np.zeros((20, 20), bool)
    truth[:, :5] = True  # its contour is column 4, 20 pixels
    assert contour_accuracy(truth, truth) == 1
    for columns, expected in ((6, 1.0), (4, 1.0), (7, 0.0), (3, 0.0)):
        found = np.zeros((20, 20), bool)
        found[:, :columns] = True
        assert contour_accuracy(truth, found) == expected
    upper = truth.copy()
    upper[10:] = False  # column 4 down to row 9, and row 9 to the left of it: 14 pixels
    precision, recall = 11 / 14, 11 / 20
    assert contour_accuracy(truth, upper) == pytest.approx(2 * precision * recall / (precision + recall))
    assert contour_accuracy(upper, truth) == contour_accuracy(truth, upper)


def test_f_of_empty_masks() -> None:
    some, none = blobs(0), np.zeros((23, 31), bool)
    assert contour_accuracy(none, none) == 1
    assert contour_accuracy(some, none) == contour_accuracy(none, some) == 0


def test_unlabelled_pixels_are_ignored() -> None:
    truth, found = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    truth[:, :5], found[:, :5] = True, True
    found[5:15, 12:18] = True
    void = np.zeros((20, 20), bool)
    void[5:15, 12:18] = True
    assert contour_accuracy(truth, found) < 0.9 and region_similarity(truth, found) < 0.9
    assert contour_accuracy(truth, found, void) == 1 and region_similarity(truth, found, void) == 1
