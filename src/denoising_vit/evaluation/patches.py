"""Patch grids and pixels: labels of patches, interpolation to pixels, nearest neighbours."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.evaluation.masks import NO_LABEL
from denoising_vit.views.crops import Crop
from denoising_vit.views.patch_grid import patch_count
from denoising_vit.views.plan import linear_weights


def patch_counts(labels: Tensor, crop: Crop, classes: int, patch_size: int, stride: int) -> Tensor:
    """Pixels of each class in each patch of a crop; the last column counts those without a label.

    Every pixel of the mask counts once, for the patch whose centre is nearest: where patches do not overlap, the one
    it lies in. Nothing is resampled.

    Args:
        labels: of the image, (H, W), NO_LABEL where there is none.
        crop: what is shown of it.
        classes: K.
        patch_size: side of a patch in pixels of what is shown.
        stride: distance between patches.

    Returns:
        (h, w, K + 1) int64.
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
    """The commonest class of each patch (h, w), NO_LABEL where most pixels have none: counts (h, w, K + 1)."""
    none = counts.shape[-1] - 1
    found = counts.argmax(-1)
    return torch.where((found == none) | (counts.sum(-1) == 0), NO_LABEL, found)


def _nearest_patch(places: np.ndarray, count: int, patch_size: int, stride: int) -> np.ndarray:
    shown = ~np.isnan(places)
    # Half up, so that a pixel on the border between two patches belongs to the second.
    cell = np.floor((np.where(shown, places, 0) - patch_size / 2) / stride + 0.5).astype(np.int64)
    return np.where(shown, np.clip(cell, 0, count - 1), -1)


def to_pixels(
    scores: Tensor, crop: Crop, patch_size: int, stride: int, stretched: tuple[int, int] | None = None
) -> Tensor:
    """Scores of a crop's patches, bilinear at the pixels that its box is rendered to, pads left out.

    Args:
        scores: (h, w, K).
        crop: what was shown.
        patch_size: side of a patch in pixels.
        stride: distance between patches.
        stretched: as for :meth:`Crop.places_shown`; up to 3 pixels off at 512.

    Returns:
        (H, W, K) for the crop's size H x W.
    """
    return at_places(scores, *crop.places_shown(stretched), patch_size, stride)


def at_places(scores: Tensor, rows: np.ndarray, columns: np.ndarray, patch_size: float, stride: float) -> Tensor:
    """Scores of patches (h, w, K), bilinear at rows and columns in pixels of what was shown: (rows, columns, K)."""
    down, across = (
        # linear_weights has nodes at cell centres: patch k is at (k + 0.5) / patches.
        torch.from_numpy(linear_weights(((places - patch_size / 2) / stride + 0.5) / patches, patches)).to(scores)
        for places, patches in ((rows, scores.shape[0]), (columns, scores.shape[1]))
    )
    return torch.einsum("yh,hwk,xw->yxk", down, scores, across)


def to_image(scores: Tensor, height: int, width: int) -> Tensor:
    """Scores (H, W, K) of a whole image, bilinear at another number of pixels (height, width, K)."""
    down, across = (
        torch.from_numpy(linear_weights((np.arange(count) + 0.5) / count, have)).to(scores)
        for count, have in zip((height, width), scores.shape[:2], strict=True)
    )
    return torch.einsum("yh,hwk,xw->yxk", down, scores, across)


def centre_pads(height: int, width: int, patch_size: int, stride: int) -> tuple[int, int, int, int]:
    """Pads (left, top, right, bottom) that bring an image to whole patches, as even on both sides as can be."""
    (top, bottom), (left, right) = (
        _halves(-(side - patch_size) % stride if side >= patch_size else patch_size - side) for side in (height, width)
    )
    return left, top, right, bottom


def _halves(pixels: int) -> tuple[int, int]:
    return pixels // 2, pixels - pixels // 2


#: Similarities that are held at a time, and queries that they are of at most.
_AT_ONCE, _QUERIES = 2**25, 4096


def nearest(queries: Tensor, bank: Tensor, k: int, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k features of a bank that are most similar to each query.

    Args:
        queries: (Q, C), of any length.
        bank: (N, C), normalised, N at least k.
        k: how many.
        without: (N,) bool, rows of the bank that are left out; k others have to remain.

    Returns:
        Cosines (Q, k), falling, and rows of the bank (Q, k).
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
