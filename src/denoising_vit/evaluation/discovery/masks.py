"""Objects in masks: the box around all pixels of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.discovery.boxes import Box, box_around
from denoising_vit.evaluation.masks import MAX_OBJECTS, WHITE, Coding, read_mask


class _Numbers(Coding):
    """Numbers of objects rather than of classes."""

    def decoded(self, values: np.ndarray, name: str) -> np.ndarray:
        numbers = values.astype(np.int64)
        found = np.unique(numbers)
        wrong = found[((found < 0) | (found > MAX_OBJECTS)) & (found != WHITE)]
        if len(wrong):
            shown = ", ".join(map(str, wrong[:3].tolist())) + (", ..." if len(wrong) > 3 else "")
            raise EvaluationError(
                f"{name}: {len(found)} different values, {len(wrong)} of them neither 0, {WHITE} nor numbers of "
                f"objects ({shown}); expected 0 and {WHITE}, or 0 and 1 to {MAX_OBJECTS} with {WHITE} for no object. "
                "Was the mask blurred, or kept as JPEG?"
            )
        return numbers


_NUMBERS = _Numbers(MAX_OBJECTS + 1, "the objects")


@dataclass(frozen=True)
class MaskTruth:
    """The objects of one mask, which has the photo's size.

    Attributes:
        path: of the mask.
    """

    path: Path

    def objects(self, height: int, width: int) -> dict[int, Box]:
        """Boxes by the number in the mask: 1 to 50, or 255 alone where there is no other.

        Raises:
            EvaluationError: if the mask cannot be read, has another size or other values, or no object.
        """
        numbers = read_mask(self.path, _NUMBERS)
        if numbers.shape != (height, width):
            raise EvaluationError(
                f"expected photo and mask of the same size, got a photo of {width} x {height} pixels and a mask of "
                f"{numbers.shape[1]} x {numbers.shape[0]} ({self.path})"
            )
        every = [number for number in np.unique(numbers).tolist() if number]
        chosen = [number for number in every if number != WHITE] or every
        if not chosen:
            raise EvaluationError(f"{self.path}: no object, all {numbers.size:,} pixels are 0")
        return {number: _around(numbers == number) for number in chosen}


def _around(mask: np.ndarray) -> Box:
    x0, y0, x1, y1 = map(float, box_around(mask))
    return x0, y0, x1, y1
