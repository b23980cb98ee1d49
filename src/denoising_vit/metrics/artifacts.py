"""All label-free metrics of one source of features; none of them is meaningful on its own."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from denoising_vit.metrics.checks import checked
from denoising_vit.metrics.position import linear_position_r2, neighbour_position_r2, position_mic
from denoising_vit.metrics.tokens import (
    consistency,
    detail,
    effective_rank,
    leakage,
    neighbour_similarity,
    outlier_share,
    shared_pattern,
)

#: Number of directions of the response to images without content, for the leakage.
LEAKAGE_RANK = 8

#: Number of neighbours of the position probe; fewer for small grids.
NEIGHBOURS = 20

#: Number of images for the maximal information coefficient, which takes seconds per image.
MIC_IMAGES = 4

#: Directions with a smaller fraction of the responses' norm are rounding errors.
_FLAT = 1e-4


@dataclass(frozen=True)
class ArtifactMetrics:
    """Label-free metrics. :mod:`denoising_vit.metrics.tokens` lists a useless map with the best value of each.

    Attributes:
        shared: energy of the pattern shared by all images, relative to a token's; 0 after subtracting means.
        linear_position: R^2 of a linear probe for the position in the view; 0 after subtracting means.
        neighbour_position: R^2 of a nearest-neighbour probe for the position.
        mic: maximal information coefficient with the position of the best channel, mean over x and y, in [0, 1].
        leakage: fraction of the features' energy in the directions of responses to black and mean images; None if flat.
        outliers_high: fraction of tokens with norms far above the others.
        outliers_low: fraction of tokens with norms far below the others.
        consistency: R^2 between features at the same position in two views; None without a second view.
        effective_rank: RankMe, 1 to C.
        neighbour_similarity: mean cosine of adjacent patches.
        detail: fraction of the variance in differences of adjacent patches.
        blank_variance: fraction of raw's variance over positions that remains on images without content. This and the
            next four are from :func:`~denoising_vit.metrics.blank_test.blank_figures`; None without a single pass.
        blank_detail: the same for high frequencies.
        blurred_detail: the same for high frequencies on heavily blurred photos.
        shift_change: change of features at the same position of a photo under sub-patch shifts, relative to raw's.
        photo_variance: fraction of raw's variance over positions that remains on photos; the four above are 0 for a
            constant map.
    """

    shared: float
    linear_position: float
    neighbour_position: float
    mic: float
    leakage: float | None
    outliers_high: float
    outliers_low: float
    consistency: float | None
    effective_rank: float
    neighbour_similarity: float
    detail: float
    blank_variance: float | None = None
    blank_detail: float | None = None
    blurred_detail: float | None = None
    shift_change: float | None = None
    photo_variance: float | None = None

    @property
    def outliers(self) -> float:
        """Fraction of tokens with outlying norms."""
        return self.outliers_high + self.outliers_low


def artifact_metrics(
    features: Tensor, *, responses: Tensor | None = None, pair: tuple[Tensor, Tensor] | None = None, seed: int = 0
) -> ArtifactMetrics:
    """Compute all metrics of one source of features, except those of the blank-image test.

    Args:
        features: features of at least 8 images, (N, h, w, C); preferably of crops whose position is independent of
            their content. Probes are fitted and tested within each half of the images, and averaged: if each half was
            cleaned with the artifact of the other, no probe sees an artifact estimated from its own images (errors
            would be opposite in training and test images).
        responses: the backbone's features of images without content, (M, h, w, C).
        pair: features at the same positions in two views, (n, h, w, C) each.
        seed: seed for the probes.

    Raises:
        EvaluationError: if there are fewer than 8 images, or features are not finite or constant.
    """
    features = checked(features)
    halves = features.split(-(-len(features) // 2))
    neighbours = min(NEIGHBOURS, halves[0][..., 0].numel() // 8)
    outliers = outlier_share(features)
    return ArtifactMetrics(
        shared=shared_pattern(features),
        linear_position=mean(linear_position_r2(half, train=len(half) // 2) for half in halves),
        neighbour_position=mean(
            neighbour_position_r2(half, train=len(half) // 2, neighbours=neighbours, seed=seed) for half in halves
        ),
        mic=position_mic(features[:MIC_IMAGES]),
        leakage=None if responses is None else _leakage(features, responses),
        outliers_high=outliers.high,
        outliers_low=outliers.low,
        consistency=None if pair is None else consistency(*pair),
        effective_rank=effective_rank(features),
        neighbour_similarity=neighbour_similarity(features),
        detail=detail(features),
    )


def _leakage(features: Tensor, responses: Tensor) -> float | None:
    """Leakage; None if responses are flat: without artifact, an empty image has the same feature everywhere."""
    spread = (responses - responses.mean((1, 2), keepdim=True)).flatten(0, 2).double()  # (M h w, C)
    directions = torch.linalg.svdvals(spread) > _FLAT * float(responses.flatten(0, 2).double().norm())
    rank = min(LEAKAGE_RANK, int(directions.sum()))
    return leakage(features, responses, rank=rank) if rank else None
