"""The patch grid: counts, centres and sides by hand, and sides that do not fit."""

from __future__ import annotations

import numpy as np
import pytest

from denoising_vit.errors import SizeError
from denoising_vit.views.patch_grid import check_side, nearest_sizes, patch_centres, patch_count

# --- counts ---


@pytest.mark.parametrize(
    ("side", "patch", "stride", "count"),
    [
        (14, 14, 14, 1),
        (518, 14, 14, 37),
        (518, 14, 7, 73),
        (34, 10, 4, 7),  # starts at 0, 4, ..., 24
        (37, 10, 4, 7),  # three pixels are left over
        (38, 10, 4, 8),
    ],
)
def test_counts_by_hand(side: int, patch: int, stride: int, count: int) -> None:
    assert patch_count(side, patch, stride) == count
    assert len(patch_centres(side, patch, stride)) == count


def test_no_patch_fits_a_shorter_side() -> None:
    assert patch_count(13, 14, 14) < 1
    assert patch_centres(3, 14, 2).size == 0


# --- centres ---


def test_centres_with_stride_equal_to_patch() -> None:
    # 6 patches of 16 pixels: their centres are at 8, 24, ..., 88 of 96.
    np.testing.assert_allclose(patch_centres(96, 16, 16), np.array([8, 24, 40, 56, 72, 88]) / 96, rtol=1e-15)
    np.testing.assert_allclose(patch_centres(518, 14, 14), (np.arange(37) + 0.5) / 37, rtol=1e-12)


def test_centres_with_overlapping_patches() -> None:
    centres = patch_centres(518, 14, 7)
    assert len(centres) == 73
    assert centres[0] == pytest.approx(7 / 518)
    assert centres[1] == pytest.approx(14 / 518)
    assert centres[-1] == pytest.approx(511 / 518)
    # This differs from the centres of 73 equal cells:
    assert abs(centres[0] - 0.5 / 73) > 0.2 * 14 / 518


def test_centres_of_a_single_patch() -> None:
    assert patch_centres(14, 14, 14).tolist() == [0.5]


def test_centres_are_symmetric_where_the_stride_fits() -> None:
    centres = patch_centres(34, 10, 4)  # (34 - 10) / 4 = 6, so 7 patches
    assert len(centres) == 7
    np.testing.assert_allclose(centres + centres[::-1], 1)


# --- sides ---


@pytest.mark.parametrize(
    ("side", "patch", "stride", "nearest"),
    [
        (518, 14, 14, (518,)),
        (519, 14, 14, (518, 532)),
        (531, 14, 14, (518, 532)),
        (34, 10, 4, (34,)),
        (36, 10, 4, (34, 38)),
        (3, 14, 7, (14,)),
    ],
)
def test_nearest_sides_by_hand(side: int, patch: int, stride: int, nearest: tuple[int, ...]) -> None:
    assert nearest_sizes(side, patch, stride) == nearest


def test_sides_that_fit_are_accepted() -> None:
    for side in (10, 14, 18, 34):
        check_side(side, 10, 4)


def test_sides_that_do_not_fit_are_rejected_with_the_nearest() -> None:
    with pytest.raises(SizeError, match=r"50 pixels .*expected a multiple of 16 pixels .*Nearest: 48 or 64"):
        check_side(50, 16, 16)
    with pytest.raises(SizeError, match=r"expected 10 \+ k \* 4 pixels .*Nearest: 34 or 38"):
        check_side(36, 10, 4)
    with pytest.raises(SizeError, match=r"a side of 0 pixels .*Nearest: 14"):
        check_side(0, 14, 14)
