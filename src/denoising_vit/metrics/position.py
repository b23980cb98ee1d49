"""Position metrics: how well features predict the position of a patch in the grid, by probes and by MIC.

No metric is meaningful on its own: a nearly constant map also has no position information. Subtracting the mean over
images per position removes every linear trace of position by construction, so a linear probe then finds nothing even if
the position can still be predicted, as a nearest-neighbour probe shows.

MIC, the maximal information coefficient (Reshef et al., Science 2011), is the largest mutual information between two
variables over grids of k x l bins with k l <= B, each divided by its upper bound log min(k, l). Appendix A.4 of
Denoising Vision Transformers takes its maximum over channels as a measure of position artifacts, with B = (h w)^0.6.

This is MIC_e (Reshef et al., JMLR 2016): the axis with more bins is divided into bins of equal mass, the other
optimally. It is a consistent estimator of the same quantity, and takes 2 s for 384 channels of a 37 x 37 grid instead
of 45 s for the original search in C. Its values are lower (0.03 instead of 0.12 for noise of that size), so they are
not comparable with the paper's table. No library is used: minepy does not build on Python 3.11 or later, fast-mine has
a single release and needs numba, and both are GPL.
"""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.metrics.checks import checked, moments
from denoising_vit.views.plan import random_stream

#: Minimum number of images to fit a probe, and to test it.
_LEAST_IMAGES = 2

#: Number of candidate cuts of the optimal axis: per bin, and at least _LEAST_CLUMPS in total.
_CLUMPS_PER_BIN = 5
_LEAST_CLUMPS = 40

#: Number of channels per batch, a trade-off between memory and time in loops.
_CHUNK = 64


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
    return torch.from_numpy(random_stream(seed).random_sample((images, patches)).argsort(axis=1)[:, :count].copy())


def _r2(truth: Tensor, predicted: Tensor) -> float:
    """R^2 of predictions (n, 2), mean over both columns."""
    error = (truth - predicted).square().sum(0)
    return float((1 - error / (truth - truth.mean(0)).square().sum(0)).mean())


def mic(a: Tensor | np.ndarray, b: Tensor | np.ndarray, exponent: float = 0.6) -> float:
    """MIC_e of two variables: towards 0 if independent, towards 1 if one is a function of the other.

    1 for a noiseless monotonic relation of an even number of distinct values, and near 1 for others with many points.
    For independent pairs it is about 0.12 with 100 points, 0.065 with 400, 0.035 with 1,369. Equal values stay in one
    bin. For up to 40 points, all cuts of the optimal axis are tried; for more, at least 40 quantiles.

    Args:
        a: (n,) values.
        b: (n,) values.
        exponent: grids have at most n^exponent cells, and at least 4.

    Returns:
        In [0, 1]; symmetric in a and b.

    Raises:
        EvaluationError: if the lengths differ, there are fewer than 4 points, or a value is not finite.
    """
    first, second = (torch.as_tensor(values).detach().cpu().double().numpy() for values in (a, b))
    if first.ndim != 1 or first.shape != second.shape or len(first) < 4:
        raise EvaluationError(f"expected two vectors of equal length, at least 4, got {first.shape} and {second.shape}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise EvaluationError("expected finite values for MIC")
    return float(_mic_of_rows(first[None], second, exponent)[0])


def position_mic(features: Tensor, exponent: float = 0.6) -> float:
    """MIC of the best channel with a patch's position, as in appendix A.4 of Denoising Vision Transformers.

    Mean over images and over x and y of the largest MIC_e of any channel with that coordinate. For 384 channels of
    independent normal features on 37 x 37 patches it is 0.05, and 0.9995 for a channel equal to x, because 37 columns
    cannot be halved. Takes about 2 s per image of that size.

    Args:
        features: (N, h, w, C), h w >= 4.
        exponent: grids have at most (h w)^exponent cells.

    Returns:
        In [0, 1]; 0 for constant channels.

    Raises:
        EvaluationError: if features are not finite, constant, or misshapen.
    """
    features = checked(features)
    _, h, w, channels = features.shape
    if h * w < 4:
        raise EvaluationError(f"MIC needs a grid of at least 4 patches, got {h} x {w}")
    y, x = np.divmod(np.arange(h * w), w)
    rows = [image.reshape(h * w, channels).T.numpy() for image in features]  # (h, w, C) -> (C, h w)
    with ThreadPoolExecutor() as pool:  # NumPy uses one core here
        found = pool.map(lambda pair: _mic_of_rows(pair[0], pair[1], exponent).max(), itertools.product(rows, (x, y)))
        return float(np.mean(list(found)))


def _mic_of_rows(values: np.ndarray, other: np.ndarray, exponent: float) -> np.ndarray:
    """MIC_e of each row of values (C, n) with other (n,): (C,)."""
    if not 0 < exponent <= 1:
        raise EvaluationError(f"exponent must be in (0, 1], got {exponent}")
    n = len(other)
    cells = max(math.floor(n**exponent + 1e-9), 4)  # 32^0.6 is 8, not 7.999...
    clumps = max(_LEAST_CLUMPS, _CLUMPS_PER_BIN * math.isqrt(cells))
    entropy_terms = np.arange(n + 1) * np.log(np.maximum(np.arange(n + 1), 1))  # m log m, for every possible count
    other_ranks = _mid_ranks(other[None])
    best = []
    for start in range(0, len(values), _CHUNK):
        ranks = _mid_ranks(values[start : start + _CHUNK])
        both = (ranks, np.broadcast_to(other_ranks, ranks.shape))
        scores = np.zeros(len(ranks))
        for equal, optimal in (both, both[::-1]):
            cuts = _bins(optimal, min(clumps, n))
            for bins in range(2, cells // 2 + 1):
                counts = _joint_counts(cuts, min(clumps, n), _bins(equal, bins), bins)
                scores = np.maximum(scores, _best_score(counts, min(bins, cells // bins), entropy_terms))
        best.append(scores)
    return np.clip(np.concatenate(best), 0, 1)  # rounding may leave a perfect relation at 1 + 1e-16


def _mid_ranks(values: np.ndarray) -> np.ndarray:
    """Twice the mid-rank of each value in its row, (C, n) -> (C, n) in [1, 2n - 1]; ties share it."""
    rows, n = values.shape
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    place = np.arange(n)
    opens = np.concatenate([np.ones((rows, 1), bool), ordered[:, 1:] != ordered[:, :-1]], axis=1)
    closes = np.concatenate([opens[:, 1:], np.ones((rows, 1), bool)], axis=1)
    first = np.maximum.accumulate(np.where(opens, place, 0), axis=1)
    last = np.minimum.accumulate(np.where(closes, place, n - 1)[:, ::-1], axis=1)[:, ::-1]
    ranks = np.empty((rows, n), np.int64)
    np.put_along_axis(ranks, order, first + last + 1, axis=1)
    return ranks


def _bins(ranks: np.ndarray, count: int) -> np.ndarray:
    """Bins of nearly equal mass; ties have one rank and are never split."""
    return ranks * count // (2 * ranks.shape[1])


def _joint_counts(cuts: np.ndarray, clumps: int, bins: np.ndarray, count: int) -> np.ndarray:
    """Points of each row in each bin and the first t clumps: (C, n) twice -> (count, clumps + 1, C)."""
    rows = len(cuts)
    cell = (bins * clumps + cuts) * rows + np.arange(rows)[:, None]
    counts = np.bincount(cell.ravel(), minlength=count * clumps * rows).reshape(count, clumps, rows)
    return np.concatenate([np.zeros_like(counts[:, :1]), counts.cumsum(1)], axis=1)


def _best_score(cumulative: np.ndarray, most: int, entropy_terms: np.ndarray) -> np.ndarray:
    """Largest normalised information, (C,), over cuts of the clumps into k = 2 to ``most`` intervals.

    ``cumulative`` (l, P + 1, C) counts the points in each of l bins of the first t of P clumps; ``entropy_terms`` has
    m log m for m = 0 to n.

    An interval with m(q) points in bin q adds W = sum_q m(q) log m(q) - m log m to n (I - H(bins)), independently of
    the others, so dynamic programming over the start of the last interval finds the best cuts.
    """
    everything = cumulative[:, -1:]  # (l, 1, C)
    n = int(everything[..., 0].sum())

    def gain(counts: np.ndarray) -> np.ndarray:  # (l, s, C) -> (s, C)
        return entropy_terms[counts].sum(0) - entropy_terms[counts.sum(0)]

    best = gain(cumulative)  # (P + 1, C): one interval from the start to t
    rest = gain(everything - cumulative)  # (P + 1, C): the last interval, from s to the end
    bin_entropy = math.log(n) - entropy_terms[everything[:, 0]].sum(0) / n  # (C,)
    scores = (bin_entropy + (best + rest).max(0) / n) / math.log(2)
    if most > 2:
        # Not needed for two intervals: the last one always ends at the end.
        inner = [gain(cumulative[:, t : t + 1] - cumulative[:, : t + 1]) for t in range(len(best))]  # each (t + 1, C)
        for k in range(3, most + 1):
            best = np.stack([(best[: t + 1] + gains).max(0) for t, gains in enumerate(inner)])
            scores = np.maximum(scores, (bin_entropy + (best + rest).max(0) / n) / math.log(k))
    return scores
