"""Keypoints of one photo looked for in another, by the similarity of features alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.evaluation.correspondence.pair import Point
from denoising_vit.evaluation.patches import at_places
from denoising_vit.views.plan import linear_weights

#: Interpolated feature values that are held at a time.
_AT_ONCE = 2**24


def at_points(features: Tensor, points: np.ndarray, patch_size: int, stride: int) -> Tensor:
    """Features of patches (h, w, C), bilinear at points: (n, C).

    Args:
        features: of a photo.
        points: (n, 2), row and column in pixels of what was shown; beyond the outermost patches' middles, these count.
        patch_size: side of a patch in pixels of what was shown.
        stride: distance between patches.
    """
    down, across = (
        # linear_weights has nodes at cell centres: patch k is at (k + 0.5) / patches.
        torch.from_numpy(linear_weights(((places - patch_size / 2) / stride + 0.5) / patches, patches)).to(features)
        for places, patches in zip(points.T, features.shape[:2], strict=True)
    )
    return torch.einsum("nh,hwc,nw->nc", down, features, across)


def best_places(queries: Tensor, target: Tensor, patch_size: int, stride: int, upsample: int = 1) -> np.ndarray:
    """Where a photo's features are most similar (cosine) to others: (n, 2), row and column in pixels of what was shown.

    Args:
        queries: features (n, C), of any length: it changes nothing in which place is most similar.
        target: features (h, w, C) of the photo.
        patch_size: side of a patch in pixels of what was shown.
        stride: distance between patches.
        upsample: by what features are interpolated first, bilinearly; with 1, places are the middles of patches. Of
            places that are as similar the first is taken, row by row.
    """
    h, w, channels = target.shape
    rows, columns = (_places(count, patch_size, stride, upsample) for count in (h, w))
    best = torch.full((len(queries),), -torch.inf, device=queries.device)
    found = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    band = max(_AT_ONCE // (len(columns) * channels), 1)
    for start in range(0, len(rows), band):
        features = at_places(target, rows[start : start + band], columns, patch_size, stride)
        similarity, place = (queries @ F.normalize(features, dim=-1).flatten(0, 1).T).max(-1)
        better = similarity > best
        best = torch.where(better, similarity, best)
        found = torch.where(better, place + start * len(columns), found)
    row, column = np.divmod(found.cpu().numpy(), len(columns))
    return np.stack([rows[row], columns[column]], axis=-1)


def _places(patches: int, patch_size: int, stride: int, upsample: int) -> np.ndarray:
    """Middles of the parts of patches along one side, in pixels."""
    return patch_size / 2 + ((np.arange(patches * upsample) + 0.5) / upsample - 0.5) * stride


def to_shown(points: Sequence[Point], height: int, width: int, size: tuple[int, int]) -> np.ndarray:
    """Points (x, y) of a photo of height x width pixels: (n, 2), row and column where it is shown at a size."""
    x, y = np.array(points, dtype=np.float64).T
    return np.stack([(y + 0.5) / height * size[0], (x + 0.5) / width * size[1]], axis=-1)


def from_shown(places: np.ndarray, height: int, width: int, size: tuple[int, int]) -> np.ndarray:
    """Back: (n, 2), x and y in pixels of the photo."""
    row, column = places.T
    return np.stack([column / size[1] * width - 0.5, row / size[0] * height - 0.5], axis=-1)


def apart(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How far points (n, 2) are from where they should be: (n,), in their unit."""
    return np.linalg.norm(found - truth, axis=-1)
