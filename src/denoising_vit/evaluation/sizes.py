"""At which size an image is shown: the one that is asked for, or its own, rounded to the patch grid."""

from __future__ import annotations

from typing import Protocol

from denoising_vit.evaluation.judged import JudgedImage
from denoising_vit.views.patch_grid import check_side, nearest_sizes


class Patches(Protocol):
    """Whatever cuts images into patches: a backbone, a source of features."""

    patch_size: int
    stride: int


def shown_size(size: int | tuple[int, int] | None, image: JudgedImage, patches: Patches) -> tuple[int, int]:
    """(H, W) in pixels at which an image is shown.

    Raises:
        SizeError: if the size that is asked for does not fit the patch grid.
    """
    if size is None:
        return native_size(image.height, image.width, patches.patch_size, patches.stride)
    check_size(size, patches.patch_size, patches.stride)
    return (size, size) if isinstance(size, int) else size


def check_size(size: int | tuple[int, int] | None, patch_size: int, stride: int) -> None:
    """Refuses a size that is not covered by whole patches.

    Raises:
        SizeError: naming the nearest sides that are.
    """
    for side in () if size is None else (size,) if isinstance(size, int) else size:
        check_side(side, patch_size, stride)


def native_size(height: int, width: int, patch_size: int, stride: int) -> tuple[int, int]:
    """The nearest sides that fit the patch grid, the larger one of two that are as near."""
    down, across = (
        max(nearest_sizes(side, patch_size, stride), key=lambda fitting: (-abs(fitting - side), fitting))
        for side in (height, width)
    )
    return down, across
