"""Options of label propagation and keypoint matching."""

from __future__ import annotations

import math
from dataclasses import dataclass

from denoising_vit.errors import PlanError
from denoising_vit.evaluation.options import at_least, positive


@dataclass(frozen=True)
class PropagationOptions:
    """Options of label propagation; the defaults are the published ones except for the size (Caron et al. 2021).

    Attributes:
        size: height and width of the model's input in pixels, or one number for a square. Without it, the frame's
            own, rounded to the patch grid. Published: 480 pixels high.
        context: number of earlier frames that labels are taken from, besides the first one.
        k: number of most similar patches in the context that vote, more in case of ties.
        radius: radius of the search window around a patch, in patches; 0 for the whole frame. With larger patches or
            larger frames, give another one.
        temperature: temperature of the votes' weights, exp(cosine / temperature).
    """

    size: int | tuple[int, int] | None = None
    context: int = 7
    k: int = 5
    radius: int = 12
    temperature: float = 0.1

    def validate(self) -> None:
        """Check the range of every option.

        Raises:
            PlanError: naming the option, its range and its value.
        """
        at_least(self, context=0, k=1, radius=0)
        positive(self, "temperature")


@dataclass(frozen=True)
class MatchingOptions:
    """Options of keypoint matching.

    Attributes:
        size: height and width of the model's input in pixels, or one number for a square. Without it, the photo's own,
            rounded to the patch grid.
        alpha: a match is correct within this share of the larger side of the target object's box; each value gives a
            line of results.
        upsample: upsampling factor of the target's features before the search; 1 for the patches themselves.
    """

    size: int | tuple[int, int] | None = None
    alpha: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2)
    upsample: int = 1

    def validate(self) -> None:
        """Check the range of every option.

        Raises:
            PlanError: naming the option, its range and its value.
        """
        different = len(set(self.alpha)) == len(self.alpha) > 0
        if not (different and all(0 < one < math.inf for one in self.alpha)):
            raise PlanError(f"alpha must be one positive number or more, all different, got {self.alpha}")
        at_least(self, upsample=1)
