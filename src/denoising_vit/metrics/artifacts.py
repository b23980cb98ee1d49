"""The label-free figures of one source of features, side by side, because none of them means anything alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.metrics.checks import checked
from denoising_vit.metrics.consistency import consistency
from denoising_vit.metrics.mic import position_mic
from denoising_vit.metrics.position import linear_position_r2, neighbour_position_r2
from denoising_vit.metrics.tokens import (
    detail,
    effective_rank,
    leakage,
    neighbour_similarity,
    outlier_share,
    shared_pattern,
)

#: Directions of the response to images without content that features are looked at in.
LEAKAGE_RANK = 8

#: Neighbours of the probe, fewer where there are hardly as many patches.
NEIGHBOURS = 20

#: Images that the maximal information coefficient is averaged over; it takes seconds for each.
MIC_IMAGES = 4

#: Directions in which responses vary by less than this share of their size are rounding.
_FLAT = 1e-4


@dataclass(frozen=True)
class ArtifactMetrics:
    """Label-free figures; which of them useless maps win is said in :mod:`denoising_vit.metrics.tokens`.

    Attributes:
        shared: energy of what is the same at a place in all images, relative to a token's; zeroed by subtracting means.
        linear_position: R^2 of a linear probe for the place in the view; zeroed by subtracting means, by construction.
        neighbour_position: R^2 of a nearest-neighbour probe for it.
        mic: mean over x and y of the largest maximal information coefficient of a channel with it, in [0, 1].
        leakage: share of the features' energy where the responses to black and mean images lie; None if they are flat.
        outliers_high: share of tokens with norms far above the others'.
        outliers_low: share of tokens with norms far below the others'.
        consistency: R^2 of features of the same place between two views; None where there is no second view.
        effective_rank: RankMe, 1 to C.
        neighbour_similarity: mean cosine of adjacent patches.
        detail: share of the variance in differences of adjacent patches.
        blank_variance: share of raw's variance over places that is left on images without content. This and the next
            four are those of :func:`~denoising_vit.metrics.blank_test.blank_figures`; None for what is no one pass.
        blank_detail: the same of its high frequencies.
        blurred_detail: the same on heavily blurred photos.
        shift_change: change of features at the same place of a photo shifted by part of a patch, relative to raw's.
        photo_variance: share of raw's variance over places that is left on photos; a constant map wins all four above.
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
        """Share of tokens with outlying norms."""
        return self.outliers_high + self.outliers_low


def artifact_metrics(
    features: Tensor, *, responses: Tensor | None = None, pair: tuple[Tensor, Tensor] | None = None, seed: int = 0
) -> ArtifactMetrics:
    """All figures of one source of features.

    Args:
        features: of at least 8 images, (N, h, w, C); best of crops whose place says nothing about their content.
            Probes are fitted and tested within the first half and within the second half of them, and the two results
            averaged: where each half was cleaned with an artifact found in the other, no probe sees an artifact that
            its own images helped to find (their errors would be opposite in training and test images).
        responses: the backbone's, to images without content, (M, h, w, C).
        pair: features of the same places as one view has them and as another has them, (n, h, w, C) both.
        seed: of the probes' draws.

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


@torch.no_grad()
def features_of(extractor: Callable[[Tensor], Tensor], images: Iterable[Tensor]) -> Tensor:
    """Features (N, h, w, C) of any extractor for normalised images of one size, (B, 3, H, W) each, on the CPU.

    Raises:
        EvaluationError: if there are none.
    """
    found = [extractor(image).float().cpu() for image in images]
    if not found:
        raise EvaluationError("no images to take features of")
    return torch.cat(found)


def _leakage(features: Tensor, responses: Tensor) -> float | None:
    """None where the responses are flat: a backbone without artifact answers an empty image with one vector."""
    spread = (responses - responses.mean((1, 2), keepdim=True)).flatten(0, 2).double()  # (M h w, C)
    directions = torch.linalg.svdvals(spread) > _FLAT * float(responses.flatten(0, 2).double().norm())
    rank = min(LEAKAGE_RANK, int(directions.sum()))
    return leakage(features, responses, rank=rank) if rank else None
