"""Scores of predicted classes: counted image by image, so that differences can be judged over images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.masks import NO_LABEL


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
    def items(self) -> int:
        """How many images."""
        return len(self.hits)

    @property
    def groups(self) -> np.ndarray:
        """Each image is a group of its own."""
        return np.arange(self.items)

    @property
    def there(self) -> np.ndarray:
        """(images,) bool: whether an image has anything to count."""
        return (self.truth + self.predicted).sum(1) > 0

    def only(self, classes: Sequence[int]) -> Counts:
        """The counts of some classes alone: pixels of others still count where they were predicted as one of these."""
        chosen = list(classes)
        return Counts(self.hits[:, chosen], self.truth[:, chosen], self.predicted[:, chosen])

    def scored(self) -> dict[str, float]:
        """mIoU, mAcc and aAcc in percent.

        Raises:
            EvaluationError: if no pixel has a label, or there is but one class.
        """
        found = scores(self)
        return {"mIoU": found.miou, "mAcc": found.macc, "aAcc": found.aacc}

    def drawn(self, weights: np.ndarray) -> np.ndarray:
        """The mIoU (rows,) in percent under weights (rows, images), NaN where no weighted image has a label."""
        hits, truth, predicted = (weights @ values for values in (self.hits, self.truth, self.predicted))
        iou = _ratio(hits, truth + predicted - hits)
        there = ~np.isnan(iou)
        return 100 * _ratio(np.where(there, iou, 0).sum(1), there.sum(1) * (truth.sum(1) > 0))

    def classes(self, data: Any) -> dict[str, dict[str, float | None]]:
        """IoU and Acc of each class of labelled data."""
        found = scores(self)
        names = data.scored
        return {name: {"IoU": found.iou[k], "Acc": found.acc[k]} for k, name in enumerate(names)}

    def arrays(self) -> dict[str, np.ndarray]:
        """The three counts."""
        return {"hits": self.hits, "truth": self.truth, "predicted": self.predicted}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Back from arrays."""
        return cls(arrays["hits"], arrays["truth"], arrays["predicted"])


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
        EvaluationError: if no pixel has a label, or there is but one class, of which everything is found.
    """
    hits, truth, predicted = (values.sum(0).astype(float) for values in (counts.hits, counts.truth, counts.predicted))
    if not truth.sum():
        raise EvaluationError("no pixel of the images that are judged has a label, so there is nothing to score")
    iou, acc = _ratio(hits, truth + predicted - hits), _ratio(hits, truth)
    if np.isfinite(iou).sum() < 2:
        raise EvaluationError(
            f"one of {len(iou)} classes alone is there, and nothing else is predicted, which is no score; expected at "
            "least 2. Are all classes in the masks, with the numbers of the list?"
        )
    return Scores(
        miou=float(100 * np.nanmean(iou)),
        macc=float(100 * np.nanmean(acc)),
        aacc=float(100 * hits.sum() / truth.sum()),
        iou=_percent(iou),
        acc=_percent(acc),
    )


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Part / whole, NaN for 0 / 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


def _percent(values: np.ndarray) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(value) else float(100 * value) for value in values)
