"""Nearest-neighbour patch labels: what a feature says without any training (the paper's table 5 has k = 20)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

#: Sharpness with which nearer neighbours weigh more, as in nearest-neighbour probes of DINO.
_TEMPERATURE = 0.07


def patch_labels(mask: Path, grid: tuple[int, int], classes: int) -> Tensor:
    """The commonest class in each cell of a grid over an index mask, (h, w) int64; -1 where most of it has none."""
    pixels = np.asarray(Image.open(mask))
    h, w = grid
    rows = np.minimum((np.arange(pixels.shape[0]) + 0.5) / pixels.shape[0] * h, h - 1).astype(int)
    columns = np.minimum((np.arange(pixels.shape[1]) + 0.5) / pixels.shape[1] * w, w - 1).astype(int)
    cells = rows[:, None] * w + columns[None, :]
    counts = np.zeros((h * w, classes + 1), dtype=np.int64)
    np.add.at(counts, (cells.ravel(), np.minimum(pixels, classes).ravel()), 1)
    commonest = counts.argmax(1)
    return torch.from_numpy(np.where(commonest == classes, -1, commonest)).view(h, w)


def nearest_labels(queries: Tensor, gallery: Tensor, labels: Tensor, classes: int, k: int = 20) -> Tensor:
    """Labels (Q,) of queries (Q, C) by the k nearest of a gallery (N, C) with labels (N,), by cosine."""
    gallery = torch.nn.functional.normalize(gallery.float(), dim=-1)
    queries = torch.nn.functional.normalize(queries.float(), dim=-1)
    one_hot = torch.nn.functional.one_hot(labels, classes).float()
    found = []
    for part in queries.split(2048):
        similarity, nearest = (part @ gallery.T).topk(k, dim=-1)  # (q, k)
        weights = (similarity / _TEMPERATURE).softmax(-1)
        found.append((weights[..., None] * one_hot[nearest]).sum(1).argmax(-1))  # (q, k, classes) -> (q,)
    return torch.cat(found)


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


def paired_interval(ours: np.ndarray, theirs: np.ndarray, draws: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval, over images, of the difference of mean IoU; counts (images, classes, classes) each."""
    chance = np.random.default_rng(0)
    images = len(ours)
    picks = (chance.integers(images, size=images) for _ in range(draws))
    differences = [mean_iou(ours[pick]) - mean_iou(theirs[pick]) for pick in picks]
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(low), float(high)
