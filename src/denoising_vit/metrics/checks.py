"""Input checks of all metrics: a stack of finite feature maps that are not constant."""

from __future__ import annotations

import torch
from torch import Tensor

from denoising_vit.errors import EvaluationError

#: Variance below this fraction of the mean square is rounding error; its square root is 16 steps of float32.
_ROUNDING = 1e-12


def checked(features: Tensor, name: str = "features") -> Tensor:
    """Check features (N, h, w, C) and return them detached, on the CPU, in float32.

    Args:
        features: (N, h, w, C).
        name: name for messages.

    Raises:
        EvaluationError: if the shape differs, a value is not finite, or all tokens are the same.
    """
    features = checked_finite(features, name)
    _, variance = moments(features)
    mean_square = sum(float(image.double().square().sum()) for image in features) / features[..., 0].numel()
    if variance <= _ROUNDING * mean_square:
        raise EvaluationError(
            f"constant output: all {features[..., 0].numel()} tokens of {name} are the same; check the weights and the "
            "input"
        )
    return features


def checked_finite(features: Tensor, name: str = "features") -> Tensor:
    """Like :func:`checked`, for features that may be constant.

    Raises:
        EvaluationError: if the shape differs, or a value is not finite.
    """
    if features.ndim != 4 or 0 in features.shape:
        raise EvaluationError(f"expected {name} of non-empty shape (N, h, w, C), got {tuple(features.shape)}")
    features = features.detach().to("cpu", torch.float32)
    finite = torch.isfinite(features)
    if not finite.all():
        raise EvaluationError(
            f"{int((~finite).sum())} of {features.numel()} values of {name} are not finite; check the weights, or use "
            "dtype float32"
        )
    return features


def moments(features: Tensor) -> tuple[Tensor, float]:
    """Mean (C,) of all tokens of (N, h, w, C), and their variance summed over channels, in float64."""
    tokens = features[..., 0].numel()
    # Image by image, because a float64 copy of all features would be twice their size.
    mean = torch.stack([image.double().sum((0, 1)) for image in features]).sum(0) / tokens
    variance = sum(float((image.double() - mean).square().sum()) for image in features) / tokens
    return mean, variance
