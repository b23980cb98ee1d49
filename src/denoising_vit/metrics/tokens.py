"""Label-free metrics of a set of feature maps: outlier norms, spread, smoothness, and what comes with the position.

No single one of these can be read alone, since each is won by a useless map:

- position probes and MIC (``position.py``, ``mic.py``), leakage and shared energy: a map that is nearly constant, or
  noise, has no position in it;
- neighbour similarity: a blurred or nearly constant map is the smoothest of all;
- outlier share: a map scaled to unit norm has none;
- effective rank and detail: white noise has the highest.

An artifact is removed where position, outliers and leakage fall while effective rank and detail do not. A map that is
exactly constant is refused: ``constant output``.

All features are (N, h, w, C), moved to the CPU in float32; sums are taken in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.metrics.checks import checked, checked_finite, moments

#: Norms within this factor (as a logarithm) of the median never count as outliers, however alike the others are.
_LEAST_SPREAD = 1e-3

#: Images whose halves can be held against each other.
_LEAST_IMAGES = 4

#: Longest norm that counts as it is, in medians.
_LONGEST = 3.0


@dataclass(frozen=True)
class OutlierShare:
    """Share of tokens with outlying norms.

    Attributes:
        high: above the bound, as in DINOv2 and DeiT-III.
        low: below the bound, as in CLIP.
    """

    high: float
    low: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.high + self.low


def outlier_share(features: Tensor, bound: float = 5.0) -> OutlierShare:
    """Share of tokens whose log-norm is beyond median +- bound x 1.4826 MAD of all tokens' log-norms.

    High-norm tokens are those of Darcet et al., Vision Transformers Need Registers (ICLR 2024), who cut at a norm fixed
    by hand for each model; a robust deviation needs no such number. With the default bound, log-normal norms count
    6e-7 of the tokens. Where the deviation is below 0.1 % of the norm (unit-norm features: MAD = 0), 0.1 % is taken.

    Args:
        features: (N, h, w, C).
        bound: robust standard deviations.

    Returns:
        Shares in [0, 1]; up to about half, since the median is taken for clean.

    Raises:
        EvaluationError: if features are not finite, constant, or of another shape, or bound is not positive.
    """
    if not bound > 0:
        raise EvaluationError(f"bound must be positive, got {bound}")
    features = checked(features)
    norms = torch.cat([image.double().norm(dim=-1).flatten() for image in features]).numpy()  # (N h w,)
    log_norms = np.log(np.maximum(norms, np.finfo(np.float64).tiny))  # a token of zeros is low, not an error
    offset = log_norms - np.median(log_norms)
    limit = bound * max(1.4826 * float(np.median(np.abs(offset))), _LEAST_SPREAD)
    return OutlierShare(high=float((offset > limit).mean()), low=float((offset < -limit).mean()))


def effective_rank(features: Tensor) -> float:
    """RankMe: the exponential of the entropy of the singular values, normalised to sum to one.

    Garrido et al., RankMe (ICML 2023), of the matrix of all tokens (N h w, C), not centred, as there: a large common
    mean counts as one direction and lowers the value. Singular values come from the C x C Gram matrix in float64.

    Args:
        features: (N, h, w, C).

    Returns:
        A number in [1, min(N h w, C)].

    Raises:
        EvaluationError: if features are not finite, constant, or of another shape.
    """
    features = checked(features)
    singular = torch.linalg.eigvalsh(_gram(features, torch.zeros(features.shape[-1]))).clamp(min=0).sqrt()
    share = singular / singular.sum()
    return float(torch.special.entr(share).sum().exp())


def neighbour_similarity(features: Tensor) -> float:
    """Mean cosine of patches side by side or one above the other, features centred per channel over the data.

    Without centring, the common mean of all features would make any two patches alike.

    Args:
        features: (N, h, w, C), more than one patch.

    Returns:
        A number in [-1, 1]: 0 for white noise, towards 1 for blurred maps. Neither end is good by itself.

    Raises:
        EvaluationError: if features are not finite, constant, or of another shape.
    """
    features = _checked_pairs(features)
    mean, _ = moments(features)
    total, pairs = 0.0, 0
    for image in features:
        unit = torch.nn.functional.normalize(image.double() - mean, dim=-1)
        for first, second in _adjacent(unit):
            total += float((first * second).sum())
            pairs += first[..., 0].numel()
    return total / pairs


def detail(features: Tensor) -> float:
    """Share of the variance in differences of adjacent patches: mean squared difference / (2 x variance).

    Args:
        features: (N, h, w, C), more than one patch; any shift, scale or rotation of the channels gives the same.

    Returns:
        0 or more: 1 for white noise, towards 0 for blurred maps, about 2 for a checkerboard.

    Raises:
        EvaluationError: if features are not finite, constant, or of another shape.
    """
    features = _checked_pairs(features)
    _, variance = moments(features)
    total, pairs = 0.0, 0
    for image in features:
        for first, second in _adjacent(image.double()):
            total += float((first - second).square().sum())
            pairs += first[..., 0].numel()
    return total / pairs / (2 * variance)


def typical_energy(features: Tensor) -> float:
    """Median squared distance of a token from the median token: the variance, but for a few outliers.

    A hundredth of the tokens, ten times as long as the others, doubles the variance and leaves this as it is. Where
    most tokens are the same (empty backgrounds), so that the median is zero, it is the variance.

    Args:
        features: (N, h, w, C).

    Raises:
        EvaluationError: if features are not finite, constant, or of another shape.
    """
    features = checked(features)
    tokens = features.flatten(0, 2)  # (N h w, C)
    middle = float((tokens - tokens.median(0).values).square().sum(1).double().median())
    return middle if middle > 0 else moments(features)[1]


def shared_pattern(features: Tensor) -> float:
    """Energy of what is the same at a place in all images, relative to the typical energy of a token.

    The mean over one half of the images, place by place, times that over the other half: content of one half says
    nothing about that of the other, so no noise adds up, and features without a shared pattern give zero on average.
    Halves take images in pairs, so that each has both where two kinds take turns.

    Args:
        features: (N, h, w, C), N at least 4; of crops whose place says nothing about their content.

    Returns:
        At most about 1; below zero by chance.

    Raises:
        EvaluationError: if there are fewer than 4 images, or features are not finite or constant.
    """
    features = checked(features)
    if len(features) < _LEAST_IMAGES:
        raise EvaluationError(f"a shared pattern takes {_LEAST_IMAGES} images at least, got {len(features)}")
    limit = (
        float(features.norm(dim=-1).median()) * _LONGEST
    )  # outliers are measured elsewhere, and would add noise here
    bounded = features * (limit / features.norm(dim=-1, keepdim=True).clamp(min=limit))
    odd = torch.arange(len(bounded)) // 2 % 2 == 1
    first, second = (half.mean(0, dtype=torch.float64) for half in (bounded[~odd], bounded[odd]))
    first, second = (mean - mean.mean((0, 1)) for mean in (first, second))
    return float((first * second).sum(-1).mean()) / typical_energy(features)


def leakage(features: Tensor, responses: Tensor, rank: int) -> float:
    """Black-image leakage: share of the features' energy in the directions in which empty images' responses vary.

    What a backbone says about an image without content (all black, all mean) differs from patch to patch by position
    alone. The ``rank`` first principal directions of those differences span a subspace; this is the share of the
    centred features' energy within it. Not from a paper; compare it with a subspace drawn at random, which holds
    rank / C of any features on average, and of isotropic features exactly.

    Args:
        features: (N, h, w, C), centred here per channel over all tokens.
        responses: (M, h', w', C) to images without content, each centred here over its positions.
        rank: dimensions of the subspace, 1 to C.

    Returns:
        A number in [0, 1].

    Raises:
        EvaluationError: if channels disagree, a value is not finite, features are constant, or the responses vary in
            fewer than ``rank`` directions.
    """
    features, responses = checked(features), checked_finite(responses, "responses")
    channels = features.shape[-1]
    if responses.shape[-1] != channels:
        raise EvaluationError(f"features have {channels} channels, but the responses {responses.shape[-1]}")
    if not 1 <= rank <= channels:
        raise EvaluationError(f"rank must be 1 to {channels}, the number of channels, got {rank}")
    gram = sum(_gram(image[None], moments(image[None])[0]) for image in responses)
    values, vectors = torch.linalg.eigh(torch.as_tensor(gram))  # ascending: the squared singular values of the stack
    # Rounding of float32 responses leaves directions of their own; they are no subspace to measure anything by.
    floor = 1e-12 * float(responses.double().square().sum())
    directions = int((values > floor).sum())
    if directions < rank:
        raise EvaluationError(
            f"the responses vary over positions in {directions} directions, but rank is {rank}; take a lower rank, or "
            "responses to more images (0 directions: they do not depend on the position, nothing can leak)"
        )
    covariance = _gram(features, moments(features)[0])
    subspace = vectors[:, -rank:]  # (C, rank)
    inside = (subspace * (covariance @ subspace)).sum() / covariance.trace()
    return float(inside.clamp(0, 1))


def _gram(features: Tensor, mean: Tensor) -> Tensor:
    """Sum over tokens of the outer product of (token - mean), in float64: (N, h, w, C), (C,) -> (C, C)."""
    gram = torch.zeros(features.shape[-1], features.shape[-1], dtype=torch.float64)
    for image in features:
        tokens = image.flatten(0, 1).double() - mean  # (h, w, C) -> (h w, C)
        gram += tokens.T @ tokens
    return gram


def _checked_pairs(features: Tensor) -> Tensor:
    """Checked features whose grid has at least one pair of adjacent patches: (N, h, w, C)."""
    features = checked(features)
    if features.shape[1] * features.shape[2] < 2:
        raise EvaluationError("adjacent patches need a grid of 2 patches or more, got 1 x 1")
    return features


def _adjacent(image: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each patch of (h, w, C) and the next one, to the right and below: (h, w - 1, C) twice, (h - 1, w, C) twice."""
    return [(image[:, :-1], image[:, 1:]), (image[:-1], image[1:])]
