"""One split of a labelled data set: the images that can be used, and what cannot and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from denoising_vit.data import Skipped, spread
from denoising_vit.data.photos import photo_digest, read_photo
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.judged import JudgedSet
from denoising_vit.evaluation.labelled.images import Coding, LabelledImage, read_mask
from denoising_vit.evaluation.layouts import Pair, check_count, inspect_all


@dataclass(frozen=True)
class LabelledSet(JudgedSet[LabelledImage]):
    """One split, in a fixed order.

    Attributes:
        class_names: of classes 0 to K - 1.
    """

    class_names: tuple[str, ...]

    @cached_property
    def pixels(self) -> tuple[int, ...]:
        """Labelled pixels of each class, K of them."""
        counts = np.zeros(len(self.class_names), dtype=np.int64)
        for image in self.images:
            counts += image.class_pixels
        return tuple(counts.tolist())

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes that have no pixel here."""
        return tuple(name for name, count in zip(self.class_names, self.pixels, strict=True) if count == 0)

    def subset(self, count: int) -> LabelledSet:
        """At most so many images, evenly spread over all of them; 0 takes all.

        Raises:
            EvaluationError: if the count is negative.
        """
        check_count(count)
        return replace(self, images=tuple(self.images[index] for index in spread(len(self.images), count)))


def inspect(
    split: str,
    pairs: Sequence[Pair],
    coding: Coding,
    class_names: tuple[str, ...],
    *,
    skipped: Sequence[Skipped] = (),
    progress: Callable[[], None] | None = None,
) -> LabelledSet:
    """Reads every photo and mask once, so that what cannot be used is known before the work begins.

    Args:
        split: ``train`` or ``val``.
        pairs: in the order that the set shall have.
        coding: what the masks' numbers mean.
        class_names: of classes 0 to K - 1.
        skipped: what was found to be unusable before.
        progress: called after each pair.

    Raises:
        EvaluationError: if nothing usable remains.
    """
    images, unusable = inspect_all(lambda pair: _inspect_one(split, pair, coding), pairs, progress)
    failed = [*skipped, *unusable]
    if not images:
        first = f"; the first reason: {failed[0].item}: {failed[0].reason}" if failed else ""
        raise EvaluationError(
            f"expected photos with masks for the split {split}, none of {len(pairs)} pairs can be used{first}"
        )
    return LabelledSet(split, tuple(images), class_names, skipped=tuple(failed))


def _inspect_one(split: str, pair: Pair, coding: Coding) -> LabelledImage | Skipped:
    photo = read_photo(pair.photo)
    labels = read_mask(pair.mask, coding)
    height, width = labels.shape
    if photo.shape[:2] != labels.shape:
        return Skipped(
            pair.id,
            f"expected photo and mask of the same size, got a photo of {photo.shape[1]} x {photo.shape[0]} pixels and "
            f"a mask of {width} x {height} ({pair.mask})",
        )
    counts = np.bincount(labels[labels >= 0], minlength=coding.classes)
    return LabelledImage(
        split=split,
        id=pair.id,
        photo=pair.photo,
        mask=pair.mask,
        coding=coding,
        height=height,
        width=width,
        digest=photo_digest(photo),
        mask_digest=photo_digest(labels.astype("<i4")),  # the same on every machine
        class_pixels=tuple(counts.tolist()),
    )
