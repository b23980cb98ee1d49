"""Patch grids and pixels: input sizes, labels of patches, interpolation to pixels, nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.evaluation.data import EvaluationImage
from denoising_vit.evaluation.masks import NO_LABEL
from denoising_vit.views.crops import Crop
from denoising_vit.views.patch_grid import check_side, nearest_sizes, patch_count
from denoising_vit.views.plan import linear_weights

Image = TypeVar("Image", bound=EvaluationImage)


class Patches(Protocol):
    """A backbone or a source of features."""

    patch_size: int
    stride: int


def whole_images(
    images: Sequence[Image], size: int | tuple[int, int] | None, patches: Patches
) -> list[tuple[Image, Crop]]:
    """Images, each as one crop, at a size that fits the patch grid; with None, at their own size."""
    return [(image, Crop.whole(shown_size(size, image, patches))) for image in images]


def shown_size(size: int | tuple[int, int] | None, image: EvaluationImage, patches: Patches) -> tuple[int, int]:
    """(H, W) in pixels of the model's input for an image: the given size, or its own, rounded to the patch grid."""
    if size is None:
        return native_size(image.height, image.width, patches)
    check_size(size, patches)
    return (size, size) if isinstance(size, int) else size


def check_size(size: int | tuple[int, int] | None, patches: Patches) -> None:
    """Raise SizeError with the nearest valid sides unless whole patches cover the size."""
    for side in () if size is None else (size,) if isinstance(size, int) else size:
        check_side(side, patches.patch_size, patches.stride)


def native_size(height: int, width: int, patches: Patches) -> tuple[int, int]:
    """The nearest sides that fit the patch grid; of two equally near sides, the larger."""

    def fitted(side: int) -> int:
        sides = nearest_sizes(side, patches.patch_size, patches.stride)
        return min(sides, key=lambda each: (abs(each - side), -each))

    return fitted(height), fitted(width)


def patch_counts(labels: Tensor, crop: Crop, classes: int, patch_size: int, stride: int) -> Tensor:
    """Pixels of each class in each patch of a crop, (h, w, K + 1) int64; the last column counts pixels without a label.

    Each pixel of the mask counts once, for the patch with the nearest centre. Nothing is resampled.
    """
    h, w = (patch_count(side, patch_size, stride) for side in crop.padded)
    rows, columns = crop.places(*labels.shape)
    row, column = (
        _nearest_patch(places, count, patch_size, stride) for places, count in ((rows, h), (columns, w))
    )  # (H,) and (W,), -1 where the pixel is not shown
    down, across = np.flatnonzero(row >= 0), np.flatnonzero(column >= 0)
    cells = torch.from_numpy(row[down, None] * w + column[None, across])
    shown = labels[torch.from_numpy(down)][:, torch.from_numpy(across)]
    kinds = torch.where(shown == NO_LABEL, classes, shown)
    counted = torch.bincount((cells * (classes + 1) + kinds).flatten(), minlength=h * w * (classes + 1))
    return counted.view(h, w, classes + 1)


def commonest(counts: Tensor) -> Tensor:
    """Most frequent class (h, w) of each patch from counts (h, w, K + 1); NO_LABEL if unlabelled is most frequent."""
    none = counts.shape[-1] - 1
    found = counts.argmax(-1)
    return torch.where((found == none) | (counts.sum(-1) == 0), NO_LABEL, found)


def _nearest_patch(places: np.ndarray, count: int, patch_size: int, stride: int) -> np.ndarray:
    shown = ~np.isnan(places)
    # Round half up, so that a pixel on the border between two patches belongs to the second.
    cell = np.floor((np.where(shown, places, 0) - patch_size / 2) / stride + 0.5).astype(np.int64)
    return np.where(shown, np.clip(cell, 0, count - 1), -1)


def quota(most: int, number: int, images: int) -> int | None:
    """Number of patches to take from image ``number``, so that all images together give ``most``; None (all) if 0."""
    return (number + 1) * most // images - number * most // images if most else None


def to_pixels(
    scores: Tensor, crop: Crop, patch_size: int, stride: int, stretched: tuple[int, int] | None = None
) -> Tensor:
    """Interpolate scores (h, w, K) of patches bilinearly to the pixels of a crop, without pads: (H, W, K).

    ``stretched`` is as in :meth:`Crop.places_shown`; it shifts positions by up to 3 pixels at 512.
    """
    return at_places(scores, *crop.places_shown(stretched), patch_size, stride)


def at_places(scores: Tensor, rows: np.ndarray, columns: np.ndarray, patch_size: float, stride: float) -> Tensor:
    """Interpolate scores (h, w, K) of patches bilinearly at rows and columns given in pixels: (rows, columns, K)."""
    return torch.einsum("yh,hwk,xw->yxk", *_weighted(scores, rows, columns, patch_size, stride))


def at_points(scores: Tensor, points: np.ndarray, patch_size: float, stride: float) -> Tensor:
    """Like :func:`at_places`, at points (n, 2), each a row and a column: (n, K)."""
    rows, columns = points.T
    return torch.einsum("nh,hwk,nw->nk", *_weighted(scores, rows, columns, patch_size, stride))


def _weighted(
    scores: Tensor, rows: np.ndarray, columns: np.ndarray, patch_size: float, stride: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Interpolation weights (n, h) at the rows, scores (h, w, K), and interpolation weights (m, w) at the columns."""
    down, across = (
        # linear_weights has nodes at cell centres: patch k is at (k + 0.5) / patches.
        torch.from_numpy(linear_weights(((places - patch_size / 2) / stride + 0.5) / patches, patches)).to(scores)
        for places, patches in ((rows, scores.shape[0]), (columns, scores.shape[1]))
    )
    return down, scores, across


def to_image(scores: Tensor, height: int, width: int) -> Tensor:
    """Resize scores (H, W, K) of a whole image bilinearly to (height, width, K)."""
    down, across = (
        torch.from_numpy(linear_weights((np.arange(count) + 0.5) / count, have)).to(scores)
        for count, have in zip((height, width), scores.shape[:2], strict=True)
    )
    return torch.einsum("yh,hwk,xw->yxk", down, scores, across)


def crop_at(
    top: int, left: int, shown: tuple[int, int], size: tuple[int, int], pads: tuple[int, int, int, int]
) -> Crop:
    """The crop of ``shown`` pixels (H, W) that starts at a row and a column of an image of ``size`` (H, W)."""
    height, width = size
    return Crop((left / width, top / height, (left + shown[1]) / width, (top + shown[0]) / height), shown, pads)


def part_of(crop: Crop, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of a crop from :func:`crop_at` in its image of H x W pixels."""
    left, top = round(crop.box[0] * width), round(crop.box[1] * height)
    return slice(top, top + crop.size[0]), slice(left, left + crop.size[1])


def centre_pads(height: int, width: int, patch_size: int, stride: int) -> tuple[int, int, int, int]:
    """Pads (left, top, right, bottom) to whole patches, split evenly between both sides."""
    (top, bottom), (left, right) = (
        _halves(-(side - patch_size) % stride if side >= patch_size else patch_size - side) for side in (height, width)
    )
    return left, top, right, bottom


def _halves(pixels: int) -> tuple[int, int]:
    return pixels // 2, pixels - pixels // 2


#: Maximum number of similarities in memory, and of queries per block.
_AT_ONCE, _QUERIES = 2**25, 4096


def nearest(queries: Tensor, bank: Tensor, k: int, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k most similar features of a bank for each query, block by block to bound memory.

    Args:
        queries: (Q, C), not normalised.
        bank: (N, C), normalised, with N >= k.
        k: number of neighbours.
        without: (N,) bool, rows of the bank to exclude; at least k must remain.

    Returns:
        Cosines (Q, k) in descending order, and rows of the bank (Q, k).
    """
    parts = [_nearest(part, bank, k, without) for part in F.normalize(queries, dim=-1).split(_QUERIES)]
    similarity, rows = zip(*parts, strict=True)
    return torch.cat(similarity), torch.cat(rows)


def _nearest(queries: Tensor, bank: Tensor, k: int, without: Tensor | None) -> tuple[Tensor, Tensor]:
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty_like(best, dtype=torch.int64)
    step = max(_AT_ONCE // len(queries), 1)
    for start in range(0, len(bank), step):
        similarity = queries @ bank[start : start + step].T  # (Q, block)
        if without is not None:
            similarity[:, without[start : start + step]] = -torch.inf
        found, at = similarity.topk(min(k, similarity.shape[1]), dim=-1)
        candidates = torch.cat([best, found], dim=1)
        best, chosen = candidates.topk(min(k, candidates.shape[1]), dim=-1)
        rows = torch.cat([rows, at + start], dim=1).gather(1, chosen)
    return best, rows
