"""Scores of predicted classes: counted image by image, so that differences can be judged over images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.labelled import NO_LABEL

#: Draws of the bootstrap.
DRAWS = 1000


@dataclass(frozen=True, eq=False)
class Counts:
    """What each image contributes, (images, K) int64 each.

    Attributes:
        hits: pixels (or patches) of a class that were predicted as it.
        truth: those of the class.
        predicted: those predicted as the class, among those that have a label.
    """

    hits: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Counts]) -> Counts:
        """Images of several counts, one after the other.

        Raises:
            EvaluationError: if there are none.
        """
        if not parts:
            raise EvaluationError("no predictions to score; expected those of at least one image")
        return cls(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in ("hits", "truth", "predicted"))
        )

    @classmethod
    def nothing(cls, classes: int) -> Counts:
        """One image without any label."""
        return cls(*(np.zeros((1, classes), dtype=np.int64) for _ in range(3)))

    @property
    def images(self) -> int:
        """How many."""
        return len(self.hits)


def count(predicted: Tensor, truth: Tensor, classes: int) -> Counts:
    """Counts of one image.

    Args:
        predicted: classes, of any shape, 0 to K - 1.
        truth: likewise, and NO_LABEL where there is none, which is left out.
        classes: K.

    Raises:
        EvaluationError: if the shapes differ, or nothing was predicted.
    """
    from torchmetrics.functional.classification import multiclass_stat_scores  # takes a second to import

    if predicted.shape != truth.shape or not predicted.numel():
        raise EvaluationError(
            f"expected a prediction for each label, got {tuple(predicted.shape)} for {tuple(truth.shape)}"
        )
    # (K, 5): true and false positives, true and false negatives, support. It refuses to count a single class.
    kinds = max(classes, 2)
    found = multiclass_stat_scores(predicted.flatten(), truth.flatten(), kinds, average=None, ignore_index=NO_LABEL)
    hits, false, _, _, support = found.view(kinds, 5)[:classes].T.cpu().numpy().astype(np.int64)
    return Counts(hits[None], support[None], (hits + false)[None])


@dataclass(frozen=True)
class Scores:
    """Segmentation scores in percent.

    Attributes:
        miou: mean over classes of intersection over union; a class that is neither there nor predicted is left out.
        macc: mean over the classes that are there of the share of their pixels that was found.
        aacc: share of all pixels that was found.
        iou: of each class, None where it is left out.
        acc: likewise.
    """

    miou: float
    macc: float
    aacc: float
    iou: tuple[float | None, ...]
    acc: tuple[float | None, ...]


def scores(counts: Counts) -> Scores:
    """Scores of all images together, as published segmentation benchmarks define them.

    Raises:
        EvaluationError: if no pixel has a label.
    """
    hits, truth, predicted = (values.sum(0).astype(float) for values in (counts.hits, counts.truth, counts.predicted))
    if not truth.sum():
        raise EvaluationError("no pixel of the images that are judged has a label, so there is nothing to score")
    iou, acc = _ratio(hits, truth + predicted - hits), _ratio(hits, truth)
    return Scores(
        miou=float(100 * np.nanmean(iou)),
        macc=float(100 * np.nanmean(acc)),
        aacc=float(100 * hits.sum() / truth.sum()),
        iou=_percent(iou),
        acc=_percent(acc),
    )


@dataclass(frozen=True)
class Interval:
    """The difference of two sources' mIoU in points, and where it may lie.

    Attributes:
        difference: of the scores of all images.
        low: 2.5 % of the draws are below.
        high: 2.5 % of the draws are above.
    """

    difference: float
    low: float
    high: float


def paired_interval(ours: Sequence[Counts], theirs: Sequence[Counts], draws: int = DRAWS) -> Interval:
    """95 % bootstrap interval of the difference of mIoU, paired: each draw takes the same images of both.

    Args:
        ours: of one source, for each seed of the probe; differences are averaged over seeds.
        theirs: of the other, for the same seeds.
        draws: of as many images as there are, with replacement.

    Raises:
        EvaluationError: if there are not as many images or seeds on both sides.
    """
    if not ours or len(ours) != len(theirs) or any(a.images != b.images for a, b in zip(ours, theirs, strict=True)):
        raise EvaluationError("a paired interval needs the same images and seeds on both sides")
    images = ours[0].images
    chance = np.random.default_rng(0)
    weights = chance.multinomial(images, np.full(images, 1 / images), size=draws)  # (draws, images)
    found = np.mean([_miou(a, weights) - _miou(b, weights) for a, b in zip(ours, theirs, strict=True)], axis=0)
    low, high = np.nanpercentile(found, [2.5, 97.5])
    difference = np.mean([scores(a).miou - scores(b).miou for a, b in zip(ours, theirs, strict=True)])
    return Interval(float(difference), float(low), float(high))


def _miou(counts: Counts, weights: np.ndarray) -> np.ndarray:
    """The mIoU of each draw (draws,) in percent, NaN where none of its images has a label."""
    hits, truth, predicted = (weights @ values for values in (counts.hits, counts.truth, counts.predicted))
    iou = _ratio(hits, truth + predicted - hits)
    there = ~np.isnan(iou)
    return 100 * _ratio(np.where(there, iou, 0).sum(1), there.sum(1) * (truth.sum(1) > 0))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Part / whole, NaN for 0 / 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


def _percent(values: np.ndarray) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(value) else float(100 * value) for value in values)
