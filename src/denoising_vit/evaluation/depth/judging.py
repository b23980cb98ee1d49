"""Judging a depth probe: its depth at every pixel, against what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from denoising_vit.evaluation.data import JudgedSet
from denoising_vit.evaluation.depth.head import DepthProbe
from denoising_vit.evaluation.depth.images import DepthImage
from denoising_vit.evaluation.depth.protocol import DepthProtocol
from denoising_vit.evaluation.features import FeatureCache, Shown, see, shown_size
from denoising_vit.evaluation.outcomes import Measured
from denoising_vit.evaluation.patches import centre_pads
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.views.crops import Crop

#: Rows and columns of photos of NYUv2 that are judged (Eigen et al. 2014).
EIGEN = (45, 471), (41, 601)


@dataclass(frozen=True, eq=False)
class Depths(Measured):
    """Errors of each image; the published figures are their means over images."""

    METRICS: ClassVar[tuple[str, ...]] = ("RMSE", "AbsRel", "log10", "a1", "a2", "a3")


def depth_errors(predicted: Tensor, truth: Tensor, nearest: float, farthest: float) -> list[float]:
    """Errors of one image, in the order of :attr:`Depths.METRICS`.

    Root of the mean squared error in metres; mean of |error| / truth; mean of |log10 error|; percent of pixels where
    the larger of both depths is less than 1.25, 1.25^2 and 1.25^3 times the smaller (Eigen et al. 2014). NaN where no
    pixel can be judged.

    Args:
        predicted: depth in metres, of any shape.
        truth: the same; pixels that are not between the limits are left out.
        nearest: lower limit.
        farthest: upper limit.
    """
    from torchmetrics.functional.regression import (  # takes a second to import
        mean_absolute_error,
        mean_absolute_percentage_error,
        mean_squared_error,
    )

    known = (truth > nearest) & (truth < farthest)
    if not known.any():
        return [float("nan")] * len(Depths.METRICS)
    ours, theirs = predicted[known].double(), truth[known].double()
    larger = torch.maximum(ours / theirs, theirs / ours)
    errors = (
        mean_squared_error(ours, theirs, squared=False),
        mean_absolute_percentage_error(ours, theirs),
        mean_absolute_error(ours.log10(), theirs.log10()),
        *(100 * (larger < 1.25**power).double().mean() for power in (1, 2, 3)),
    )
    return [float(error) for error in errors]


@torch.no_grad()
def judge_depth(
    probe: DepthProbe,
    source: FeatureSource,
    images: JudgedSet[DepthImage],
    protocol: DepthProtocol,
    part: tuple[tuple[int, int], tuple[int, int]] | None,
    cache: FeatureCache | None = None,
    progress: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Errors of each image, (images, figures).

    Args:
        probe: in evaluation mode.
        source: of the features.
        images: that are judged.
        protocol: sizes and limits.
        part: rows and columns that are judged; None for all.
        cache: where features of whole images are kept.
        progress: called after each image.

    Raises:
        EvaluationError: if features are not finite.
    """
    (top, bottom), (left, right) = part or ((0, None), (0, None))
    predict = _shown_padded if protocol.augment else _shown_resized
    found = []
    for image, depth in zip(images.images, predict(probe, source, images, protocol, cache), strict=True):
        depth = depth.clamp(protocol.nearest, protocol.farthest).cpu()[top:bottom, left:right]
        truth = image.metres()[top:bottom, left:right]
        found.append(depth_errors(depth, truth, protocol.nearest, protocol.farthest))
        progress()
    return np.array(found)


def _shown_resized(
    probe: DepthProbe,
    source: FeatureSource,
    images: JudgedSet[DepthImage],
    protocol: DepthProtocol,
    cache: FeatureCache | None,
) -> Iterator[Tensor]:
    """Depth (H, W) at the pixels of each image, from features of all of it."""
    shown: list[Shown] = [(image, Crop.whole(shown_size(protocol.size, image, source))) for image in images.images]
    features = see(source, shown, cache)
    tokens = see(source.class_tokens(), shown, cache) if protocol.class_token else iter([None] * len(shown))
    for (image, crop), one, token in zip(shown, features, tokens, strict=True):
        rows, columns = crop.places(image.height, image.width)
        token = None if token is None else token[None].to(source.device)
        patch = source.patch_size, source.stride
        yield probe.at_pixels(one[None].to(source.device), token, rows, columns, patch)[0]


def _shown_padded(
    probe: DepthProbe,
    source: FeatureSource,
    images: JudgedSet[DepthImage],
    protocol: DepthProtocol,
    _cache: FeatureCache | None,
) -> Iterator[Tensor]:
    """Depth (H, W) at the pixels of each image, shown as it is and padded; the mean with its mirror image's."""
    patch = source.patch_size, source.stride
    for image in images.images:
        size = image.height, image.width
        crop = Crop((0.0, 0.0, 1.0, 1.0), size, centre_pads(*size, *patch))
        crops = [crop, replace(crop, flip=True)] if protocol.flip_test else [crop]
        features, token = source.features_and_class(torch.stack([source.inputs(image, one) for one in crops]))
        places = crop.places_shown(crop.size if protocol.pads == "stretched" else None)
        depth = probe.at_pixels(features, token if protocol.class_token else None, *places, patch)
        # Each is brought between the limits before the mean is taken, as published.
        depth = depth.clamp(protocol.nearest, protocol.farthest)
        yield depth[0] if len(depth) == 1 else (depth[0] + depth[1].flip(1)) / 2
