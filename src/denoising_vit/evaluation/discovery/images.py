"""A photo whose objects' boxes are known."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from denoising_vit.evaluation.data import JudgedImage
from denoising_vit.evaluation.discovery.boxes import Box


@dataclass(frozen=True)
class BoxedImage(JudgedImage):
    """A photo with the boxes of its objects.

    Attributes:
        boxes: x0, y0, x1, y1 in pixels, half-open, within the image; sorted, one at least.
        sequence: photos of one sequence are frames of one film; the photo's id where it stands for itself.
    """

    boxes: tuple[Box, ...]
    sequence: str

    @property
    def truth_digest(self) -> str:
        """Of the boxes."""
        return hashlib.sha256(np.array(self.boxes, dtype="<f8").tobytes()).hexdigest()
