"""Masks of the objects of a video: black and white as in DAVIS 2016, or with their numbers as in DAVIS 2017."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.masks import MAX_OBJECTS, NO_LABEL, WHITE, Coding, read_mask

#: How many values of a mask a message shows.
_SHOWN = 5


class _AsWritten(Coding):
    """Takes the numbers in a file as they are, except that what has one bit is black and white."""

    def decoded(self, values: np.ndarray, name: str) -> np.ndarray:
        return values.astype(np.int64) * (WHITE if values.dtype == bool else 1)


_AS_WRITTEN = _AsWritten(WHITE + 1, "the file")


@dataclass(frozen=True)
class Objects:
    """The objects of a sequence: those in its first mask, since nothing can carry a label to others.

    Attributes:
        numbers: of the objects, in order; 1 where masks are black and white.
        binary: whether masks are black and white: 255 is the object. Otherwise they have the objects' numbers, and 255
            is no label.
    """

    numbers: tuple[int, ...]
    binary: bool

    @classmethod
    def first(cls, values: np.ndarray, name: str) -> Objects:
        """As the first mask (H, W) has them.

        Args:
            values: as the file has them.
            name: what errors call the mask.

        Raises:
            EvaluationError: if there are none, or the values are neither black and white nor numbers of objects.
        """
        there = np.unique(values).tolist()
        numbers = [value for value in there if value not in (0, WHITE)]
        if not numbers and WHITE not in there:
            raise EvaluationError(f"{name}: the first mask is empty: no object to carry a label of")
        # Next to shades of gray, as smoothing makes them, 255 is white and not a mark for no label.
        gray = WHITE in there and numbers != list(range(1, len(numbers) + 1))
        if gray or any(not 0 < number <= MAX_OBJECTS for number in numbers):
            raise EvaluationError(_complaint(there, name))
        return cls(tuple(numbers) or (1,), not numbers)

    def labels(self, values: np.ndarray, name: str) -> tuple[np.ndarray, tuple[int, ...]]:
        """What a mask of the sequence says.

        Args:
            values: (H, W) as the file has them.
            name: what errors call the mask.

        Returns:
            Labels (H, W) int64: numbers of objects, 0 for all else, NO_LABEL where there is none; and numbers in the
            mask that are none of these objects'.

        Raises:
            EvaluationError: if the values are none that the sequence's masks may have.
        """
        there = np.unique(values).tolist()
        allowed = {0, WHITE} if self.binary else {*range(MAX_OBJECTS + 1), WHITE}
        if not allowed.issuperset(there):
            raise EvaluationError(_complaint(there, name))
        if self.binary:
            return (values == WHITE).astype(np.int64), ()
        labels = np.where(np.isin(values, self.numbers), values, 0)
        labels[values == WHITE] = NO_LABEL
        return labels, tuple(value for value in there if value not in (0, WHITE, *self.numbers))


def read_values(path: Path) -> np.ndarray:
    """The numbers in a mask's file, (H, W) int64; 0 and 255 where it has one bit a pixel.

    Raises:
        EvaluationError: if the file is missing, empty, damaged, too large or no index image.
    """
    return read_mask(path, _AS_WRITTEN)


def _complaint(there: list[int], name: str) -> str:
    more = ", ..." if len(there) > _SHOWN else ""
    return (
        f"{name}: {len(there)} values ({', '.join(map(str, there[:_SHOWN]))}{more}); expected 0 and 255, or numbers of "
        f"objects from 1 to {MAX_OBJECTS} at most (0 for the background, 255 for no label). Write the mask as PNG, "
        "without smoothing"
    )
