"""Boxes in pixels of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torchvision.ops import box_iou

from denoising_vit.errors import EvaluationError

#: x0, y0, x1, y1 in pixels, half-open: an image of H x W pixels is 0, 0, W, H.
Box = tuple[float, float, float, float]

#: x0, y0, x1, y1 in elements of a mask, pixels or patches; half-open.
CellBox = tuple[int, int, int, int]

#: Pixels that a box may reach beyond the image, by rounding.
_SLACK = 1.0


def box_around(mask: np.ndarray) -> CellBox:
    """The smallest box around the true elements of a mask (h, w), at least one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def within(box: Box, height: int, width: int) -> Box:
    """Clip an annotated box to the image, if it reaches beyond it by a pixel at most.

    Raises:
        EvaluationError: if it reaches further, has no area, or is not finite.
    """
    x0, y0, x1, y1 = box
    name = f"the box x {x0:g} to {x1:g}, y {y0:g} to {y1:g}"
    if not all(map(math.isfinite, box)):
        raise EvaluationError(f"{name} is not finite")
    kept = _clip(x0, width), _clip(y0, height), _clip(x1, width), _clip(y1, height)
    if max(abs(before - after) for before, after in zip(box, kept, strict=True)) > _SLACK:
        raise EvaluationError(
            f"{name} is not within the image of {width} x {height} pixels; expected 0 to {width} and 0 to {height}, "
            "with a tolerance of one pixel. Does the annotation belong to another photo?"
        )
    if kept[0] >= kept[2] or kept[1] >= kept[3]:
        raise EvaluationError(f"{name} has no area in the image of {width} x {height} pixels")
    return kept


def _clip(place: float, size: int) -> float:
    return min(max(0.0, place), float(size))


def on_image(
    box: CellBox, grid: tuple[int, int], patch_size: int, stride: int, shown: tuple[int, int], size: tuple[int, int]
) -> Box:
    """Convert a box from patches to pixels of the image.

    Each pixel belongs to the patch with the nearest centre; without overlap, to the patch that contains it.

    Args:
        box: in patches.
        grid: number of patches (h, w).
        patch_size: patch size in pixels of the input.
        stride: distance between patches.
        shown: height and width of the input, which shows the whole image.
        size: height and width of the image.
    """
    (rows, columns), (height, width) = grid, size
    x0, x1 = (_edge(place, columns, patch_size, stride, shown[1], width) for place in (box[0], box[2]))
    y0, y1 = (_edge(place, rows, patch_size, stride, shown[0], height) for place in (box[1], box[3]))
    return x0, y0, x1, y1


def _edge(place: int, count: int, patch_size: int, stride: int, shown: int, size: int) -> float:
    """Where patch number ``place`` begins in pixels of the image; the last one ends at the image's border."""
    if place in (0, count):
        return 0.0 if place == 0 else float(size)
    return (place * stride + (patch_size - stride) / 2) * size / shown


def best_overlap(box: Box, boxes: Sequence[Box]) -> float:
    """Largest intersection over union of a box with any of several, in [0, 1]."""
    found, known = (torch.tensor(some, dtype=torch.float64) for some in ([box], list(boxes)))
    return float(box_iou(found, known).max())
