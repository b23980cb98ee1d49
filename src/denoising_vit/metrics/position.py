"""Position probes: how well features predict the position of a patch in the grid.

Neither probe is meaningful on its own: a nearly constant map also has no position information. Subtracting the mean
over images per position removes every linear trace of position by construction, so the linear probe is then 0 even if
the position can still be predicted, as the neighbour probe shows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.metrics.checks import checked, moments

_LEAST_IMAGES = 2


def linear_position_r2(features: Tensor, *, train: int, ridge: float = 0.3) -> float:
    """R^2 of a ridge regression from a patch's features to its position, mean over x and y.

    Subtracting the mean over images per position makes this 0 by construction, because the rest is uncorrelated with
    any function of the position. Use it together with :func:`neighbour_position_r2`.

    Args:
        features: (N, h, w, C); standardised with the mean and deviation of the training images.
        train: number of first images to fit the regression on; the others are predicted.
        ridge: weight of the squared coefficients. With a few dozen images and hundreds of channels, lower values
            overfit (docs/decisions.md).

    Returns:
        1 for perfect prediction, 0 for none; negative if worse than the centre of the grid.

    Raises:
        EvaluationError: if there are fewer than 2 images for training or testing, the grid has a side of 1, or features
            are not finite or constant.
    """
    features = _checked_split(features, train)
    if ridge < 0:
        raise EvaluationError(f"ridge must be at least 0, got {ridge}")
    places = _places(features)  # (h w, 2)
    centred_places = places - places.mean(0)
    mean, _ = moments(features[:train])
    gram, cross = torch.zeros(len(mean), len(mean), dtype=torch.float64), torch.zeros(len(mean), 2, dtype=torch.float64)
    for image in features[:train]:
        tokens = image.flatten(0, 1).double() - mean  # (h, w, C) -> (h w, C)
        gram += tokens.T @ tokens
        cross += tokens.T @ centred_places
    count = train * len(places)
    deviation = (gram.diagonal() / count).sqrt()
    scale = torch.where(deviation > 0, 1 / deviation, 0)  # constant channels have no weight
    gram, cross = gram * torch.outer(scale, scale) / count, cross * scale[:, None] / count
    # Least squares of minimal norm also solves ridge = 0 with dependent channels.
    weights = torch.linalg.lstsq(
        gram + ridge * torch.eye(len(mean), dtype=torch.float64), cross, driver="gelsd"
    ).solution
    weights = weights * scale[:, None]
    predicted = [places.mean(0) + (image.flatten(0, 1).double() - mean) @ weights for image in features[train:]]
    return _r2(places.repeat(len(predicted), 1), torch.cat(predicted))


def neighbour_position_r2(
    features: Tensor, *, train: int, neighbours: int = 20, tokens_per_image: int = 256, seed: int = 0
) -> float:
    """R^2 of the mean position of a patch's nearest neighbours (cosine) among patches of other images.

    Unlike the linear probe, it is not 0 by construction after subtracting the mean over images per position. Content
    with a typical position (sky above, road below) raises it, so a clean map is not at 0.

    Args:
        features: (N, h, w, C); centred per channel with the mean of the training images.
        train: number of first images to search for neighbours; positions in the others are predicted.
        neighbours: number of neighbours.
        tokens_per_image: number of patches drawn per image, at most all.
        seed: seed for the draw, which is the same for all features of the same shape.

    Returns:
        1 for perfect prediction; about -1 / k, the average of k random positions, for none.

    Raises:
        EvaluationError: if there are fewer than 2 images for training or testing, or fewer training patches than
            ``neighbours``, the grid has a side of 1, or features are not finite or constant.
    """
    from sklearn.neighbors import KNeighborsRegressor  # takes a second to import

    features = _checked_split(features, train)
    if neighbours < 1 or tokens_per_image < 1:
        raise EvaluationError(
            f"neighbours and tokens_per_image must be at least 1, got {neighbours} and {tokens_per_image}"
        )
    places = _places(features)
    drawn = _drawn(len(features), len(places), tokens_per_image, seed)  # (N, t)
    if drawn[:train].numel() < neighbours:
        raise EvaluationError(
            f"expected at least {neighbours} training patches for {neighbours} neighbours, got "
            f"{drawn[:train].numel()}; use more images or fewer neighbours"
        )
    mean, _ = moments(features[:train])
    tokens = torch.stack([image.flatten(0, 1)[index] for image, index in zip(features, drawn, strict=True)])
    tokens = torch.nn.functional.normalize(tokens.double() - mean, dim=-1).float()  # (N, t, C)
    targets = places[drawn]  # (N, t, 2)
    # On unit vectors, the order by distance equals the order by cosine; scikit-learn is faster for distances.
    probe = KNeighborsRegressor(neighbours, algorithm="brute", metric="euclidean")
    probe.fit(tokens[:train].flatten(0, 1).numpy(), targets[:train].flatten(0, 1).numpy())
    predicted = torch.from_numpy(np.asarray(probe.predict(tokens[train:].flatten(0, 1).numpy())))
    return _r2(targets[train:].flatten(0, 1), predicted)


def _checked_split(features: Tensor, train: int) -> Tensor:
    """Check features (N, h, w, C) and that they can be split into training and test images."""
    features = checked(features)
    images, h, w, _ = features.shape
    if train < _LEAST_IMAGES or images - train < _LEAST_IMAGES:
        raise EvaluationError(
            f"a position probe needs at least {_LEAST_IMAGES} images to fit and {_LEAST_IMAGES} to test, got "
            f"{train} and {images - train}; give at least {2 * _LEAST_IMAGES} images"
        )
    if h < 2 or w < 2:
        raise EvaluationError(f"a position probe needs a grid of at least 2 x 2 patches, got {h} x {w}")
    checked(features[:train], "the training images")
    return features


def _places(features: Tensor) -> Tensor:
    """(x, y) in [0, 1] of the patch centres of (N, h, w, C), row by row: (h w, 2) float64."""
    _, h, w, _ = features.shape
    y = (torch.arange(h, dtype=torch.float64) + 0.5) / h
    x = (torch.arange(w, dtype=torch.float64) + 0.5) / w
    return torch.stack([x.repeat(h), y.repeat_interleave(w)], dim=1)


def _drawn(images: int, patches: int, count: int, seed: int) -> Tensor:
    """Random patches of each image: (images, count) indices without repeats."""
    # NumPy guarantees unchanged streams only for RandomState.
    stream = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    return torch.from_numpy(stream.random_sample((images, patches)).argsort(axis=1)[:, :count].copy())


def _r2(truth: Tensor, predicted: Tensor) -> float:
    """R^2 of predictions (n, 2), mean over both columns."""
    error = (truth - predicted).square().sum(0)
    return float((1 - error / (truth - truth.mean(0)).square().sum(0)).mean())
