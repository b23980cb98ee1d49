"""The linear probe, and how its scores are brought from patches to pixels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from denoising_vit.views.crops import Crop
from denoising_vit.views.plan import linear_weights

#: Deviation of the weights that the published head starts from.
_INITIAL_DEVIATION = 0.01


class LinearProbe(nn.Module):
    """Batch norm and a 1 x 1 convolution: features (..., C) -> scores of classes (..., K).

    Args:
        channels: C.
        classes: K.
        seed: of the initial weights.
    """

    def __init__(self, channels: int, classes: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.classify = nn.Linear(channels, classes)  # a 1 x 1 convolution of tokens in a row
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.classify.weight.normal_(0, _INITIAL_DEVIATION, generator=generator)
            self.classify.bias.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """(..., C) -> (..., K)."""
        tokens = self.norm(features.flatten(0, -2))  # (..., C) -> (N, C)
        return self.classify(tokens).unflatten(0, features.shape[:-1])


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
