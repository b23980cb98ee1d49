"""Metrics and pictures of held-out images for stages 2 and 3."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.errors import TrainError
from denoising_vit.files import atomic_path
from denoising_vit.maps import PCABasis, draw_rows
from denoising_vit.metrics.blank_test import BlankProbe, blank_figures
from denoising_vit.metrics.position import linear_position_r2, neighbour_position_r2
from denoising_vit.metrics.tokens import effective_rank
from denoising_vit.training.loop import Figures

#: Number of images per forward pass, and per picture.
BATCH, SHOWN = 8, 4

#: Minimum number of images for measuring position.
_PLACED = 8


class TargetSimilarity:
    """Mean cosine and squared error between features and targets, accumulated over batches."""

    def __init__(self) -> None:
        self._cosine = self._squared = self._patches = 0.0

    def add(self, clean: Tensor, target: Tensor) -> None:
        """Add features (B, h, w, C) and their targets."""
        self._cosine += float(F.cosine_similarity(clean, target, dim=-1).double().sum())
        self._squared += float((clean - target).square().mean(-1).double().sum())
        self._patches += target[..., 0].numel()

    @property
    def figures(self) -> Figures:
        """Means over patches: ``cosine`` and ``mse``."""
        return {"cosine": self._cosine / self._patches, "mse": self._squared / self._patches}


def spread(features: Tensor) -> Figures:
    """Effective rank of features (N, h, w, C), and R^2 of a linear and a nearest-neighbour probe of the position."""
    figures = {"rank": effective_rank(features)}
    if len(features) >= _PLACED and min(features.shape[1:3]) > 1:
        train = len(features) // 2
        figures["place"] = linear_position_r2(features, train=train)
        figures["place_neighbours"] = neighbour_position_r2(features, train=train, neighbours=min(20, train))
    return figures


def error_ratio(figures: Figures, raw: Figures) -> float:
    """(1 - cosine), relative to that of raw features."""
    return (1 - figures["cosine"]) / max(1 - raw["raw_cosine"], 1e-12)


def known_blank_figures(features: BlankProbe, raw: BlankProbe) -> Figures:
    """Available metrics of the blank-image test."""
    return {name: value for name, value in blank_figures(features, raw).items() if value is not None}


def draw_panel(
    folder: Path, step: int, headings: Sequence[str], rows: Sequence[tuple[str, np.ndarray, Sequence[Tensor]]]
) -> None:
    """Draw ``step-N.png``: one row per image, with one PCA basis per row.

    Args:
        folder: folder for the file; created if it does not exist.
        step: N.
        headings: headings of the features.
        rows: name, pixels (H, W, 3) uint8, and features (h, w, C) of each image.

    Raises:
        TrainError: if it cannot be written.
    """
    pictures = []
    for name, photo, maps in rows:
        basis = PCABasis.fit(*maps)
        pictures.append((name, [photo, *(basis.colours(features) for features in maps)]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / f"step-{step:07}.png") as temporary:
            draw_rows(headings, pictures, temporary)
    except OSError as error:
        raise TrainError(f"{folder}: a panel cannot be written ({error}); continue with --resume") from error
