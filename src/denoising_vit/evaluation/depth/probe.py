"""The linear depth probe and its losses."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denoising_vit.evaluation.patches import at_places

#: Added to the weights of all bins, so that every bin gets a gradient.
_FLOOR = 0.1

#: Added to depths in metres before taking the logarithm.
_EPSILON = 1e-3

#: Weight of the squared mean of the errors, relative to their variance.
_MEAN_WEIGHT = 0.15

#: Pixel strides of the scales at which gradients are compared.
_SCALES = (1, 2, 4, 6)


class DepthProbe(nn.Module):
    """1 x 1 convolution to weights of evenly spaced depth bins; the depth is their weighted mean.

    Features are not normalised, as in the published head.

    Args:
        channels: C of features and class token combined.
        bins: number of depth bins.
        nearest: depth of the first bin in metres.
        farthest: depth of the last bin in metres.
        upsample: upsampling factor of the grid before weights are made positive. The published head upsamples
            features; linear layers and bilinear interpolation commute, so upsampling scores gives the same result.
        seed: seed for the initial weights.
    """

    depths: Tensor

    def __init__(self, channels: int, bins: int, nearest: float, farthest: float, upsample: int, seed: int) -> None:
        super().__init__()
        self.upsample = upsample
        self.weigh = nn.Linear(channels, bins)
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(channels)  # default initialisation of a convolution
        with torch.no_grad():
            self.weigh.weight.uniform_(-bound, bound, generator=generator)
            self.weigh.bias.uniform_(-bound, bound, generator=generator)
        self.register_buffer("depths", torch.linspace(nearest, farthest, bins), persistent=False)

    def scores(self, features: Tensor, token: Tensor | None) -> Tensor:
        """Scores of the bins (B, h, w, K) from features (B, h, w, C) and class tokens (B, 1, 1, C)."""
        if token is None:
            return self.weigh(features)
        width = features.shape[-1]
        # The token's contribution is the same for all patches, so it is computed once.
        own, shared = self.weigh.weight[:, :width], self.weigh.weight[:, width:]
        return F.linear(features, own, self.weigh.bias) + F.linear(token, shared)

    def depth(self, scores: Tensor) -> Tensor:
        """Depth in metres (...) from scores (..., K)."""
        weights = scores.relu() + _FLOOR
        return (weights @ self.depths) / weights.sum(-1)

    def at_patches(self, features: Tensor, token: Tensor | None) -> Tensor:
        """Depth (B, h, w) in metres, one value per patch."""
        return self.depth(self.scores(features, token))

    def at_pixels(
        self, features: Tensor, token: Tensor | None, rows: np.ndarray, columns: np.ndarray, patch: tuple[int, int]
    ) -> Tensor:
        """Depth (B, rows, columns) in metres at pixels of the input, from (B, h, w, C) and tokens (B, 1, 1, C)."""
        size, stride = patch
        scores = self.scores(features, token).permute(0, 3, 1, 2)  # (B, h, w, K) -> (B, K, h, w)
        fine = F.interpolate(scores, scale_factor=self.upsample, mode="bilinear") if self.upsample > 1 else scores
        depth = self.depth(fine.permute(0, 2, 3, 1))  # (B, h, w)
        # The centre of the first cell of the finer grid precedes that of the first patch.
        cell = stride / self.upsample
        first = size / 2 - stride / 2 + cell / 2
        return at_places(depth.permute(1, 2, 0), rows, columns, 2 * first, cell).permute(2, 0, 1)


def scale_invariant_loss(predicted: Tensor, truth: Tensor, *, mean_only: bool = False) -> Tensor:
    """Root of the variance plus 0.15 times the squared mean of log depth errors (Eigen et al. 2014; AdaBins).

    Unknown depths (0) are ignored; ``mean_only`` omits the variance, as in the first steps of the published
    training.
    """
    known = truth > 0
    errors = (predicted[known] + _EPSILON).log() - (truth[known] + _EPSILON).log()
    squared = _MEAN_WEIGHT * errors.mean().square()
    if not mean_only:
        squared = squared + errors.var()
    return (squared + 1e-12).sqrt()  # the gradient of the root is infinite at 0


def gradient_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """Differences of log depth errors between pixels two apart, at four scales (MegaDepth, Li & Snavely 2018).

    The published code intends this, but slices dimensions 0 and 1 of four (images, channels) instead of rows and
    columns; with one channel and two images its loss is always 0.
    """
    total = predicted.new_zeros(())
    for step in _SCALES:
        known = truth[:, ::step, ::step] > 0
        errors = (predicted[:, ::step, ::step] + _EPSILON).log() - (truth[:, ::step, ::step] + _EPSILON).log()
        down = (errors[:, 2:] - errors[:, :-2]).abs() * (known[:, 2:] & known[:, :-2])
        across = (errors[:, :, 2:] - errors[:, :, :-2]).abs() * (known[:, :, 2:] & known[:, :, :-2])
        total = total + (down.sum() + across.sum()) / known.sum().clamp(min=1)
    return total


def depth_loss(predicted: Tensor, truth: Tensor, gradient: float, *, mean_only: bool = False) -> Tensor:
    """Scale-invariant loss plus ``gradient`` times the gradient loss, of (B, H, W); 0 where no depth is known."""
    if int((truth > 0).sum()) < 2:
        return predicted.sum() * 0
    loss = scale_invariant_loss(predicted, truth, mean_only=mean_only)
    return loss + gradient * gradient_loss(predicted, truth) if gradient else loss


def within(truth: Tensor, farthest: float) -> Tensor:
    """Depths, with those beyond the last bin set to 0 (unknown)."""
    return torch.where(truth < farthest, truth, torch.zeros_like(truth))
