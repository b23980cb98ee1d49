"""Segmentation scores, counted per image so that intervals can be taken over images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.masks import NO_LABEL
from denoising_vit.evaluation.outcomes import Outcome, ratio


@dataclass(frozen=True, eq=False)
class Counts(Outcome):
    """Counts of pixels or patches in each image, (images, K) int64 each.

    Attributes:
        hits: pixels of a class that were predicted as this class.
        truth: pixels of the class.
        predicted: labelled pixels predicted as the class.
    """

    hits: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    groups: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", np.arange(len(self.hits)))  # each image is a group

    @classmethod
    def joined(cls, parts: Sequence[Counts]) -> Counts:
        """Concatenate the images of several counts."""
        if not parts:
            raise EvaluationError("no predictions to score; expected at least one image")
        return cls(*map(np.concatenate, zip(*(part.arrays().values() for part in parts), strict=True)))

    @classmethod
    def nothing(cls, classes: int) -> Counts:
        """Counts of one image without labels."""
        return cls(*(np.zeros((1, classes), dtype=np.int64) for _ in range(3)))

    @property
    def there(self) -> np.ndarray:
        """(images,) bool: True for images with any count."""
        return (self.truth + self.predicted).sum(1) > 0

    def only(self, classes: Sequence[int]) -> Counts:
        """Counts of these classes; pixels of other classes still count if they were predicted as one of these."""
        return Counts(*(values[:, list(classes)] for values in self.arrays().values()))

    def scored(self) -> dict[str, float]:
        """mIoU, mAcc and aAcc in percent; raises the same errors as :func:`scores`."""
        found = scores(self)
        return {"mIoU": found.miou, "mAcc": found.macc, "aAcc": found.aacc}

    def drawn(self, weights: np.ndarray) -> np.ndarray:
        """Mean IoU (rows,) in percent for weights (rows, images); NaN if no weighted image has a label."""
        hits, truth, predicted = (weights @ values for values in (self.hits, self.truth, self.predicted))
        iou = ratio(hits, truth + predicted - hits)
        there = ~np.isnan(iou)
        return 100 * ratio(np.where(there, iou, 0).sum(1), there.sum(1) * (truth.sum(1) > 0))

    def classes(self, data: Any) -> dict[str, dict[str, float | None]]:
        """IoU and Acc of each class of labelled data."""
        found = scores(self)
        return {name: {"IoU": found.iou[k], "Acc": found.acc[k]} for k, name in enumerate(data.scored)}


def count(predicted: Tensor, truth: Tensor, classes: int) -> Counts:
    """Counts of one image.

    ``predicted`` has classes 0 to K - 1 and the shape of ``truth``; pixels with NO_LABEL in ``truth`` are ignored.

    Raises:
        EvaluationError: if the shapes differ, or nothing was predicted.
    """
    from torchmetrics.functional.classification import multiclass_stat_scores  # takes a second to import

    if predicted.shape != truth.shape or not predicted.numel():
        raise EvaluationError(
            f"expected a prediction for each label, got {tuple(predicted.shape)} for {tuple(truth.shape)}"
        )
    # (K, 5): true and false positives, true and false negatives, support. It rejects a single class.
    kinds = max(classes, 2)
    found = multiclass_stat_scores(predicted.flatten(), truth.flatten(), kinds, average=None, ignore_index=NO_LABEL)
    hits, false, _, _, support = found.view(kinds, 5)[:classes].T.cpu().numpy().astype(np.int64)
    return Counts(hits[None], support[None], (hits + false)[None])


@dataclass(frozen=True)
class Scores:
    """Segmentation scores in percent.

    Attributes:
        miou: mean IoU over the classes that occur or are predicted.
        macc: mean accuracy over the classes that occur.
        aacc: accuracy over all pixels.
        iou: IoU of each class; None if undefined.
        acc: accuracy of each class; None if undefined.
    """

    miou: float
    macc: float
    aacc: float
    iou: tuple[float | None, ...]
    acc: tuple[float | None, ...]


def scores(counts: Counts) -> Scores:
    """Scores over all images together, as defined by published segmentation benchmarks.

    Raises:
        EvaluationError: if no pixel has a label, or only one class occurs or is predicted.
    """
    hits, truth, predicted = (values.sum(0).astype(float) for values in (counts.hits, counts.truth, counts.predicted))
    if not truth.sum():
        raise EvaluationError("no pixel of the evaluated images has a label; expected labelled masks")
    iou, acc = ratio(hits, truth + predicted - hits), ratio(hits, truth)
    if np.isfinite(iou).sum() < 2:
        raise EvaluationError(
            f"only one of {len(iou)} classes occurs in masks or predictions; expected at least 2. Check that the mask "
            "values match the class list"
        )
    return Scores(
        miou=float(100 * np.nanmean(iou)),
        macc=float(100 * np.nanmean(acc)),
        aacc=float(100 * hits.sum() / truth.sum()),
        iou=_percent(iou),
        acc=_percent(acc),
    )


def _percent(values: np.ndarray) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(value) else float(100 * value) for value in values)
