"""Label-free metrics of feature maps: outlier norms, spread, smoothness, shared patterns, consistency.

No metric is meaningful on its own, because a useless map gets the best value of each:

- position probes and MIC (``position.py``), leakage and shared energy: a nearly constant map, or noise;
- neighbour similarity: a blurred or nearly constant map;
- outlier share: a map scaled to unit norm;
- effective rank and detail: white noise.

An artifact is removed if position, outliers and leakage fall while effective rank and detail do not. Constant maps are
rejected: ``constant output``.

All features are (N, h, w, C), moved to the CPU in float32; sums are in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from denoising_vit.decomposition.statistics import Agreement
from denoising_vit.errors import EvaluationError
from denoising_vit.metrics.checks import checked, checked_finite, moments

#: Norms within this factor (as a logarithm) of the median are never outliers.
_LEAST_SPREAD = 1e-3

#: Minimum number of images to compare two halves.
_LEAST_IMAGES = 4

#: Larger norms are scaled down to this multiple of the median.
_LONGEST = 3.0


@dataclass(frozen=True)
class OutlierShare:
    """Fraction of tokens with outlying norms.

    Attributes:
        high: fraction above the bound, as in DINOv2 and DeiT-III.
        low: fraction below the bound, as in CLIP.
    """

    high: float
    low: float

    @property
    def total(self) -> float:
        """Fraction of all outliers."""
        return self.high + self.low


def outlier_share(features: Tensor, bound: float = 5.0) -> OutlierShare:
    """Fraction of tokens with a log-norm outside median +- bound x 1.4826 MAD of all log-norms.

    High-norm tokens are those of Darcet et al., Vision Transformers Need Registers (ICLR 2024), who choose a threshold
    by hand for each model. With the default bound, 6e-7 of log-normal norms are outliers. The deviation is at
    least 0.1 % of the norm (unit-norm features: MAD = 0).

    Args:
        features: (N, h, w, C).
        bound: number of robust standard deviations.

    Returns:
        Fractions in [0, 1], at most about half, because the median is assumed to be clean.

    Raises:
        EvaluationError: if features are not finite, constant or misshapen, or the bound is not positive.
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

    Garrido et al., RankMe (ICML 2023), of the matrix of all tokens (N h w, C). Not centred, as published, so a large
    common mean lowers the value. Singular values come from the C x C Gram matrix in float64.

    Args:
        features: (N, h, w, C).

    Returns:
        A number in [1, min(N h w, C)].

    Raises:
        EvaluationError: if features are not finite, constant, or misshapen.
    """
    features = checked(features)
    singular = torch.linalg.eigvalsh(_gram(features, torch.zeros(features.shape[-1]))).clamp(min=0).sqrt()
    share = singular / singular.sum()
    return float(torch.special.entr(share).sum().exp())


def neighbour_similarity(features: Tensor) -> float:
    """Mean cosine of horizontally and vertically adjacent patches, after centring each channel over the data.

    Without centring, the common mean of all features would make any two patches similar.

    Args:
        features: (N, h, w, C), more than one patch.

    Returns:
        In [-1, 1]: 0 for white noise, towards 1 for blurred maps. Neither extreme is good.

    Raises:
        EvaluationError: if features are not finite, constant, or misshapen.
    """
    features = _checked_pairs(features)
    mean, _ = moments(features)
    units = (torch.nn.functional.normalize(image.double() - mean, dim=-1) for image in features)
    return _mean_over_pairs(units, torch.mul)


def detail(features: Tensor) -> float:
    """Fraction of the variance in differences of adjacent patches: mean squared difference / (2 x variance).

    Args:
        features: (N, h, w, C), more than one patch; invariant to shift, scale and rotation of the channels.

    Returns:
        0 or more: 1 for white noise, towards 0 for blurred maps, about 2 for a checkerboard.

    Raises:
        EvaluationError: if features are not finite, constant, or misshapen.
    """
    features = _checked_pairs(features)
    _, variance = moments(features)
    images = (image.double() for image in features)
    return _mean_over_pairs(images, lambda first, second: (first - second).square()) / (2 * variance)


def typical_energy(features: Tensor) -> float:
    """Median squared distance of a token from the median token: a variance robust to outliers.

    1 % of tokens with ten times the norm of the others double the variance but do not change this value. If most tokens
    are the same (empty backgrounds) and the median is zero, the variance is returned.

    Args:
        features: (N, h, w, C).

    Raises:
        EvaluationError: if features are not finite, constant, or misshapen.
    """
    features = checked(features)
    tokens = features.flatten(0, 2)  # (N h w, C)
    middle = float((tokens - tokens.median(0).values).square().sum(1).double().median())
    return middle if middle > 0 else moments(features)[1]


def shared_pattern(features: Tensor) -> float:
    """Energy of the pattern shared by all images at each position, relative to the typical energy of a token.

    Product of the means over each half of the images, position by position: contents of the halves are independent, so
    features without a shared pattern give zero on average. Images are assigned to halves in pairs, so that two
    alternating kinds of images are in both halves.

    Args:
        features: (N, h, w, C), N at least 4; of crops whose position is independent of their content.

    Returns:
        At most about 1; negative by chance.

    Raises:
        EvaluationError: if there are fewer than 4 images, or features are not finite or constant.
    """
    features = checked(features)
    if len(features) < _LEAST_IMAGES:
        raise EvaluationError(f"a shared pattern needs at least {_LEAST_IMAGES} images, got {len(features)}")
    # Outliers are measured elsewhere and would add noise here.
    limit = float(features.norm(dim=-1).median()) * _LONGEST
    bounded = features * (limit / features.norm(dim=-1, keepdim=True).clamp(min=limit))
    odd = torch.arange(len(bounded)) // 2 % 2 == 1
    first, second = (half.mean(0, dtype=torch.float64) for half in (bounded[~odd], bounded[odd]))
    first, second = (mean - mean.mean((0, 1)) for mean in (first, second))
    return float((first * second).sum(-1).mean()) / typical_energy(features)


def leakage(features: Tensor, responses: Tensor, rank: int) -> float:
    """Black-image leakage: fraction of the features' energy in the directions of responses to empty images.

    Features of an image without content (all black, all mean) differ between patches only by position. This is the
    fraction of the centred features' energy in the subspace of the first ``rank`` principal directions of these
    differences. Not from a paper; on average, a random subspace has rank / C of any features' energy.

    Args:
        features: (N, h, w, C); centred per channel over all tokens.
        responses: features of images without content, (M, h', w', C); each centred over its positions.
        rank: dimension of the subspace, 1 to C.

    Returns:
        In [0, 1].

    Raises:
        EvaluationError: if channels differ, a value is not finite, features are constant, or the responses vary in
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
    # Rounding errors of float32 responses also have directions, which are ignored.
    floor = 1e-12 * float(responses.double().square().sum())
    directions = int((values > floor).sum())
    if directions < rank:
        raise EvaluationError(
            f"the responses vary over positions in {directions} directions, but rank is {rank}; use a lower rank, or "
            "responses to more images (0 directions: they do not depend on the position, so nothing can leak)"
        )
    covariance = _gram(features, moments(features)[0])
    subspace = vectors[:, -rank:]  # (C, rank)
    inside = (subspace * (covariance @ subspace)).sum() / covariance.trace()
    return float(inside.clamp(0, 1))


def consistency(expected: Tensor, features: Tensor) -> float:
    """Cross-view consistency: R^2 between features at the same positions in two views.

    1 - squared difference / variance of the second view. Any dependence on the position in the view or on the rest of
    the view lowers it. It is not a criterion on its own: a blurred map agrees with itself better than a sharp one, and
    a map of the position in the *image* agrees perfectly.

    Args:
        expected: features of the first view, sampled at the positions of the second view's patches, (N, h, w, C).
        features: features of the second view, (N, h, w, C).

    Returns:
        At most 1; 0 if the first view predicts no better than the mean feature, negative if worse.

    Raises:
        EvaluationError: if shapes differ, or the features do not vary.
    """
    if expected.shape != features.shape:
        raise EvaluationError(f"expected the same shapes, got {tuple(expected.shape)} and {tuple(features.shape)}")
    agreement = Agreement()
    for truth, predicted in zip(features.double(), expected.double(), strict=True):
        agreement.add(truth, predicted)
    if agreement.r2 is None:
        raise EvaluationError("constant output: all tokens of the features are the same, so consistency is undefined")
    return agreement.r2


def _gram(features: Tensor, mean: Tensor) -> Tensor:
    """Sum over tokens of the outer product of (token - mean), in float64: (N, h, w, C), (C,) -> (C, C)."""
    gram = torch.zeros(features.shape[-1], features.shape[-1], dtype=torch.float64)
    for image in features:
        tokens = image.flatten(0, 1).double() - mean  # (h, w, C) -> (h w, C)
        gram += tokens.T @ tokens
    return gram


def _checked_pairs(features: Tensor) -> Tensor:
    """Check features (N, h, w, C) and that their grid has adjacent patches."""
    features = checked(features)
    if features.shape[1] * features.shape[2] < 2:
        raise EvaluationError("adjacent patches need a grid of at least 2 patches, got 1 x 1")
    return features


def _mean_over_pairs(images: Iterable[Tensor], measure: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Mean over horizontally and vertically adjacent patches of images (h, w, C) of a measure, summed over channels."""
    total, pairs = 0.0, 0
    for image in images:
        for first, second in ((image[:, :-1], image[:, 1:]), (image[:-1], image[1:])):
            total += float(measure(first, second).sum())
            pairs += first[..., 0].numel()
    return total / pairs
