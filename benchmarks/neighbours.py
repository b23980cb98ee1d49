"""Nearest-neighbour patch labels: a measure of features without any training (the paper's table 5 has k = 20)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from denoising_vit.evaluation.knn import vote
from denoising_vit.evaluation.masks import NO_LABEL
from denoising_vit.evaluation.options import KnnOptions
from denoising_vit.evaluation.outcomes import Interval, interval_over
from denoising_vit.evaluation.patches import commonest, patch_counts
from denoising_vit.views.crops import Crop

#: As in nearest-neighbour probes of DINO, and the default of `dvit evaluate knn`.
_TEMPERATURE = KnnOptions.temperature


def patch_labels(mask: Path, grid: tuple[int, int], classes: int) -> Tensor:
    """The most frequent class in each cell of a grid over an index mask, (h, w) int64; -1 where most of it has none."""
    pixels = torch.from_numpy(np.asarray(Image.open(mask)).astype(np.int64))
    labels = torch.where(pixels < classes, pixels, NO_LABEL)
    return commonest(patch_counts(labels, Crop.whole(grid), classes, 1, 1))  # a view with one pixel per patch


def nearest_labels(queries: Tensor, gallery: Tensor, labels: Tensor, classes: int, k: int = 20) -> Tensor:
    """Labels (Q,) of queries (Q, C) by the k nearest of a gallery (N, C) with labels (N,), by cosine."""
    gallery = torch.nn.functional.normalize(gallery.float(), dim=-1)
    return vote(queries.float(), gallery, labels, classes, k, _TEMPERATURE)


def confusion(truth: Tensor, predicted: Tensor, classes: int) -> np.ndarray:
    """Counts (classes, classes): rows are the truth."""
    counts = torch.bincount(truth * classes + predicted, minlength=classes * classes)
    return counts.view(classes, classes).numpy()


def mean_iou(counts: np.ndarray) -> float:
    """Mean intersection over union, in percent, over classes that occur; counts (..., classes, classes) are summed."""
    counts = counts.reshape(-1, *counts.shape[-2:]).sum(0).astype(float)
    hits = np.diag(counts)
    union = counts.sum(0) + counts.sum(1) - hits
    there = counts.sum(1) > 0
    return float(100 * (hits[there] / union[there]).mean())


def paired_interval(ours: np.ndarray, theirs: np.ndarray) -> Interval:
    """95 % interval, over images, of the difference of mean IoU; counts (images, classes, classes) each."""

    def figure(weights: np.ndarray) -> np.ndarray:
        return np.array(
            [mean_iou(np.tensordot(row, ours, 1)) - mean_iou(np.tensordot(row, theirs, 1)) for row in weights]
        )

    difference = mean_iou(ours) - mean_iou(theirs)
    return interval_over(
        difference, np.arange(len(ours)), figure, [counts.sum((1, 2)) > 0 for counts in (ours, theirs)]
    )
