"""The losses of the published depth evaluation: scale-invariant, and of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

#: Added to depths in metres before their logarithm is taken.
_EPSILON = 1e-3

#: Weight of the squared mean of the errors beside their variance.
_MEAN_WEIGHT = 0.15

#: Distances in pixels between kept pixels at the scales that gradients are compared at.
_SCALES = (1, 2, 4, 6)


def scale_invariant_loss(predicted: Tensor, truth: Tensor, *, mean_only: bool = False) -> Tensor:
    """Root of variance plus 0.15 times the squared mean of the errors of log depth (Eigen et al. 2014; AdaBins).

    Args:
        predicted: depth in metres, of any shape.
        truth: the same; 0 where it is not known, which is left out.
        mean_only: without the variance, as in the first steps of the published training.
    """
    known = truth > 0
    errors = (predicted[known] + _EPSILON).log() - (truth[known] + _EPSILON).log()
    squared = _MEAN_WEIGHT * errors.mean().square()
    if not mean_only:
        squared = squared + errors.var()
    return (squared + 1e-12).sqrt()  # the root's slope at 0 is infinite


def gradient_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """Differences of the error of log depth between pixels two apart, at four scales (MegaDepth, Li & Snavely 2018).

    The published code means this, but slices the first two of four dimensions, images and channels, instead of rows and
    columns; with one channel and two images its loss is always 0.

    Args:
        predicted: depth in metres, (B, H, W).
        truth: the same; 0 where it is not known.

    Returns:
        Sum over scales of the absolute differences over both directions, per known pixel.
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
    """Scale-invariant loss plus so many times the gradient loss, of (B, H, W); 0 where no depth is known."""
    if int((truth > 0).sum()) < 2:
        return predicted.sum() * 0
    loss = scale_invariant_loss(predicted, truth, mean_only=mean_only)
    return loss + gradient * gradient_loss(predicted, truth) if gradient else loss


def within(truth: Tensor, farthest: float) -> Tensor:
    """The same depths, 0 where they are beyond the last bin."""
    return torch.where(truth < farthest, truth, torch.zeros_like(truth))
