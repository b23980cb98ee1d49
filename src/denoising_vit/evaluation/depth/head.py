"""The linear probe: features and class token -> weights of depth bins -> depth."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denoising_vit.evaluation.patches import at_places

#: Added to the weights of all bins, so that none is out of reach.
_FLOOR = 0.1


class DepthProbe(nn.Module):
    """A 1 x 1 convolution to weights of evenly spaced depths; depth is their mean.

    Features are not normalised, as in the published head.

    Args:
        channels: C of features and class token together.
        bins: how many depths.
        nearest: the first in metres.
        farthest: the last.
        upsample: times by which the grid is refined before weights are made positive. Published is to upsample
            features; a linear layer and bilinear interpolation commute, so scores are upsampled, which is the same.
        seed: of the initial weights.
    """

    depths: Tensor

    def __init__(self, channels: int, bins: int, nearest: float, farthest: float, upsample: int, seed: int) -> None:
        super().__init__()
        self.upsample = upsample
        self.weigh = nn.Linear(channels, bins)
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(channels)  # what a convolution starts from
        with torch.no_grad():
            self.weigh.weight.uniform_(-bound, bound, generator=generator)
            self.weigh.bias.uniform_(-bound, bound, generator=generator)
        self.register_buffer("depths", torch.linspace(nearest, farthest, bins), persistent=False)

    def scores(self, features: Tensor, token: Tensor | None) -> Tensor:
        """Scores of the bins (B, h, w, K) of features (B, h, w, C) and class tokens (B, 1, 1, C)."""
        if token is None:
            return self.weigh(features)
        width = features.shape[-1]
        # The token's share is the same at all patches: taken once, not set beside each of them.
        own, shared = self.weigh.weight[:, :width], self.weigh.weight[:, width:]
        return F.linear(features, own, self.weigh.bias) + F.linear(token, shared)

    def depth(self, scores: Tensor) -> Tensor:
        """Depth in metres (...) of scores (..., K)."""
        weights = scores.relu() + _FLOOR
        return (weights @ self.depths) / weights.sum(-1)

    def at_patches(self, features: Tensor, token: Tensor | None) -> Tensor:
        """Depth (B, h, w) in metres, one a patch."""
        return self.depth(self.scores(features, token))

    def at_pixels(
        self, features: Tensor, token: Tensor | None, rows: np.ndarray, columns: np.ndarray, patch: tuple[int, int]
    ) -> Tensor:
        """Depth (B, rows, columns) in metres at places of what was shown, in pixels of it.

        Args:
            features: (B, h, w, C).
            token: class tokens (B, 1, 1, C), or none.
            rows: places.
            columns: places.
            patch: size and stride of the patches.
        """
        size, stride = patch
        scores = self.scores(features, token).permute(0, 3, 1, 2)  # (B, h, w, K) -> (B, K, h, w)
        fine = F.interpolate(scores, scale_factor=self.upsample, mode="bilinear") if self.upsample > 1 else scores
        depth = self.depth(fine.permute(0, 2, 3, 1))  # (B, h, w)
        # The middle of the first cell of the finer grid lies before that of the first patch.
        cell = stride / self.upsample
        first = size / 2 - stride / 2 + cell / 2
        return at_places(depth.permute(1, 2, 0), rows, columns, 2 * first, cell).permute(2, 0, 1)
