"""Labels of patches: how many pixels of each class a patch shows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from denoising_vit.evaluation.labelled import NO_LABEL
from denoising_vit.views.crops import Crop
from denoising_vit.views.patch_grid import patch_count


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
        _nearest(places, count, patch_size, stride) for places, count in ((rows, h), (columns, w))
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


def _nearest(places: np.ndarray, count: int, patch_size: int, stride: int) -> np.ndarray:
    shown = ~np.isnan(places)
    # Half up, so that a pixel on the border between two patches belongs to the second.
    cell = np.floor((np.where(shown, places, 0) - patch_size / 2) / stride + 0.5).astype(np.int64)
    return np.where(shown, np.clip(cell, 0, count - 1), -1)
