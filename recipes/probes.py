"""Quick label probes on patches, to choose views and targets, on the training data of labelled sets.

Nothing here is a published protocol; `dvit evaluate` has those. Features of all images are kept on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scenes import normalised, read_photos, render
from torch import Tensor
from torch.nn import functional

from denoising_vit.backbones import Backbone
from denoising_vit.evaluation.knn import vote
from denoising_vit.metrics.blank_test import high_frequencies, noise_image, uniform_images, variance_over_places

#: Scored classes: those with enough images.
SCORED = {"voc": (0, 8, 10, 12, 13, 15, 17), "camvid": tuple(range(11))}

#: Temperature of the nearest-neighbour vote.
TEMPERATURE = 0.07

#: Label of unlabelled patches.
NO_LABEL = 255

_COLOURS = ((0, 0, 0), (0.5, 0.5, 0.5), (1, 1, 1), (0.8, 0.2, 0.2), (0.2, 0.6, 0.3), (0.2, 0.3, 0.8), (0.9, 0.8, 0.3))


@dataclass
class Labelled:
    """Images of one set and the labels of their patches.

    Attributes:
        images: (3, H, W) uint8 each, on the device.
        labels: classes (N, h, w) int64, or depth in metres (N, h, w), 0 where unknown.
        memory: indices of the images to fit on.
        query: indices of the scored images.
    """

    images: list[Tensor]
    labels: Tensor
    memory: Tensor
    query: Tensor


def load(folder: Path, grid: tuple[int, int], device: torch.device, most: int | None = None) -> dict[str, Labelled]:
    """All sets of a folder: `NAME/*.webp` with `labels.npz`; a third of the images of each is scored.

    Args:
        folder: the folder.
        grid: (h, w) of the patch grid; labels of another are sampled.
        device: device for the features.
        most: number of images of each set, evenly chosen.
    """
    found = {}
    with np.load(folder / "labels.npz", allow_pickle=False) as labels:
        for name in sorted(labels):
            images, values = read_photos(folder / name, device), torch.from_numpy(labels[name]).to(device)
            places = np.linspace(0, len(images) - 1, min(most or len(images), len(images))).astype(int)
            images, values = [images[place] for place in places], on_grid(name, values, grid)[places]
            number = torch.arange(len(images), device=device)
            query = number % 3 == 2
            found[name] = Labelled(images, values, number[~query], number[query])
    return found


def on_grid(name: str, labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Labels (N, rows, columns) of a set, sampled on a patch grid: (N, h, w), float32 for depth, int64 for classes."""
    rows, columns = (torch.arange(n) * m // n for n, m in zip(grid, labels.shape[1:], strict=True))
    return (labels.float() if name == "nyu" else labels.long())[:, rows[:, None], columns]


def shown(data: Labelled, backbone: Backbone, size: tuple[int, int]) -> Tensor:
    """Raw features (N, h, w, C) float16 of whole images."""
    whole = np.array([[0.0, 0.0, 1.0, 1.0]])
    views = (render(image, whole, np.array([False]), size, backbone) for image in data.images)
    return torch.cat([backbone(view).half() for view in views])


def blank_images(backbone: Backbone, size: tuple[int, int]) -> dict[str, Tensor]:
    """Content-free images by kind, (B, 3, H, W), normalised."""
    generator = torch.Generator().manual_seed(99)
    grey = torch.full((3,), 0.5)
    noise = torch.stack([noise_image(size, grey, power, 1, generator) for power in (0.05, 0.2)])
    kinds = {"uniform": uniform_images(torch.tensor(_COLOURS), size), "noise": noise}
    return {name: normalised(images.to(backbone.device), backbone) for name, images in kinds.items()}


def blank_figures(raw: Tensor, clean: Tensor) -> tuple[float, float]:
    """Fractions of raw's variance over positions, and of its high frequencies, that are left."""
    return variance_over_places(clean) / variance_over_places(raw), high_frequencies(clean) / high_frequencies(raw)


def scores(name: str, data: Labelled, features: Tensor) -> dict[str, float]:
    """Metrics of one set: mIoU of nearest neighbours and of ridge regression, or RMSE in metres, and position."""
    clean = functional.normalize(features.float(), dim=-1)
    found = {"place": place(features)}
    if name == "nyu":
        return found | {"rmse": depth_error(data, features)}
    return found | {"knn": neighbours(data, clean, SCORED[name]), "ridge": ridge_classes(data, features, SCORED[name])}


def neighbours(data: Labelled, features: Tensor, scored: tuple[int, ...], k: int = 30, most: int = 60_000) -> float:
    """MIoU in percent of the k nearest patches of other images."""
    memory, labels = features[data.memory].flatten(0, 2), data.labels[data.memory].flatten()
    known = torch.nonzero(labels != NO_LABEL).flatten()
    step = max(len(known) // most, 1)
    known = known[::step]
    queries, truth = features[data.query].flatten(0, 2), data.labels[data.query].flatten()
    keep = torch.nonzero(truth != NO_LABEL).flatten()[::2]
    predicted = vote(queries[keep], memory[known], labels[known], 256, k, TEMPERATURE)
    return mean_iou(predicted, truth[keep], scored)


def ridge_classes(data: Labelled, features: Tensor, scored: tuple[int, ...]) -> float:
    """MIoU in percent of one-hot ridge regression on patches."""
    predict = class_regression(features[data.memory], data.labels[data.memory])
    truth = data.labels[data.query].flatten()
    keep = truth != NO_LABEL
    return mean_iou(predict(features[data.query].flatten(0, 2)[keep]), truth[keep], scored)


def class_regression(features: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """One-hot ridge regression of labels (N, h, w) on features (N, h, w, C): classes (Q,) of patches (Q, C)."""
    labels = labels.flatten()
    known = labels != NO_LABEL
    hot = functional.one_hot(labels[known], 256)[:, : int(labels[known].max()) + 1].double()
    weights, mean, centre = ridge(features.flatten(0, 2)[known].double(), hot)
    return lambda patches: ((patches.double() - mean) @ weights + centre).argmax(1)


def depth_regression(features: Tensor, depth: Tensor) -> Callable[[Tensor], Tensor]:
    """Ridge regression of depth (N, h, w), 0 where unknown, on features (N, h, w, C): metres (Q,) of patches (Q, C)."""
    depth = depth.flatten()
    known = depth > 0
    weights, mean, centre = ridge(features.flatten(0, 2)[known].double(), depth[known, None].double())
    return lambda patches: ((patches.double() - mean) @ weights + centre)[:, 0]


def depth_error(data: Labelled, features: Tensor) -> float:
    """RMSE in metres of ridge regression of depth on patches."""
    predict = depth_regression(features[data.memory], data.labels[data.memory])
    truth = data.labels[data.query].flatten()
    found = predict(features[data.query].flatten(0, 2))
    return float((found[truth > 0] - truth[truth > 0]).square().mean().sqrt())


def place(features: Tensor) -> float:
    """R2 of ridge regression of patch positions: fitted on every other image, scored on the rest."""
    h, w = features.shape[1:3]
    grid = torch.stack(torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij"), -1)
    where = grid.to(features.device).double().expand(len(features), h, w, 2)
    weights, mean, centre = ridge(features[::2].flatten(0, 2).double(), where[::2].flatten(0, 2))
    truth = where[1::2].flatten(0, 2)
    found = (features[1::2].flatten(0, 2).double() - mean) @ weights + centre
    return float(1 - (found - truth).square().sum() / truth.square().sum())


def ridge(features: Tensor, wanted: Tensor, strength: float = 1e-3) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (C, K), and the means of features (C,) and of targets (K,)."""
    mean, centre = features.mean(0), wanted.mean(0)
    features = features - mean
    gram = features.T @ features
    gram.diagonal().add_(strength * gram.diagonal().mean())
    return torch.linalg.solve(gram, features.T @ (wanted - centre)), mean, centre


def mean_iou(predicted: Tensor, truth: Tensor, scored: tuple[int, ...]) -> float:
    """Mean IoU in percent over the scored classes."""
    both = torch.bincount(truth * 256 + predicted, minlength=256 * 256).view(256, 256).double()
    overlap = both.diagonal()
    union = both.sum(0) + both.sum(1) - overlap
    return float(100 * (overlap / union.clamp(min=1))[list(scored)].mean())
