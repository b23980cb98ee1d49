"""Object masks of a video: black and white as in DAVIS 2016, or numbered as in DAVIS 2017."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.masks import MAX_OBJECTS, NO_LABEL, WHITE, read_values

#: Number of mask values that a message shows.
_SHOWN = 5


@dataclass(frozen=True)
class Objects:
    """The objects of a sequence: those in its first mask, as nothing can carry a label to others.

    Attributes:
        numbers: numbers of the objects in order; 1 for black and white masks.
        binary: black and white masks, with 255 as the object. Other masks have the objects' numbers, and 255 is no
            label.
    """

    numbers: tuple[int, ...]
    binary: bool

    @classmethod
    def first(cls, values: np.ndarray, name: str) -> Objects:
        """The objects in the values (H, W) of a first mask, which errors call ``name``.

        Raises:
            EvaluationError: if there are none, or the values are neither black and white nor numbers of objects.
        """
        there = np.unique(values).tolist()
        numbers = [value for value in there if value not in (0, WHITE)]
        if not numbers and WHITE not in there:
            raise EvaluationError(f"{name}: the first mask is empty: no object to carry a label of")
        # Next to shades of gray, as from smoothing, 255 is white and does not mark pixels without a label.
        gray = WHITE in there and numbers != list(range(1, len(numbers) + 1))
        if gray or any(not 0 < number <= MAX_OBJECTS for number in numbers):
            raise EvaluationError(_unexpected(there, name))
        return cls(tuple(numbers) or (1,), not numbers)

    def labels(self, values: np.ndarray, name: str) -> tuple[np.ndarray, tuple[int, ...]]:
        """Labels of the values (H, W) of a mask, which errors call ``name``.

        Returns:
            Labels (H, W) int64: numbers of objects, 0 elsewhere, NO_LABEL for pixels without a label; and numbers in
            the mask that are not in the first one.

        Raises:
            EvaluationError: if the sequence's masks cannot have these values.
        """
        there = np.unique(values).tolist()
        allowed = {0, WHITE} if self.binary else {*range(MAX_OBJECTS + 1), WHITE}
        if not allowed.issuperset(there):
            raise EvaluationError(_unexpected(there, name))
        if self.binary:
            return (values == WHITE).astype(np.int64), ()
        labels = np.where(np.isin(values, self.numbers), values, 0)
        labels[values == WHITE] = NO_LABEL
        return labels, tuple(value for value in there if value not in (0, WHITE, *self.numbers))


def _unexpected(there: list[int], name: str) -> str:
    more = ", ..." if len(there) > _SHOWN else ""
    return (
        f"{name}: {len(there)} values ({', '.join(map(str, there[:_SHOWN]))}{more}); expected 0 and 255, or numbers of "
        f"objects from 1 to {MAX_OBJECTS} at most (0 for the background, 255 for no label). Write the mask as PNG, "
        "without smoothing"
    )


def mask_values(path: Path) -> np.ndarray:
    """Values of a mask (H, W) int64; 0 and 255 for one with one bit per pixel."""
    values = read_values(path)
    return values.astype(np.int64) * (WHITE if values.dtype == bool else 1)
