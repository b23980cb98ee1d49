"""How correspondence is judged: options of the two tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from denoising_vit.errors import PlanError
from denoising_vit.evaluation.options import at_least, positive


@dataclass(frozen=True)
class PropagationOptions:
    """How labels are carried through a video; as published where nothing else is said (Caron et al. 2021).

    Attributes:
        size: height and width in pixels at which frames are shown, or one number for a square. Without it, their own,
            rounded to the patch grid. Published: 480 pixels high.
        context: earlier frames that labels are taken from, besides the first one.
        k: patches of the context that vote, those with the most similar features; more where several are as similar
            as the last of them.
        radius: of the window around a patch in which they are looked for, in patches to each side; 0 for the whole
            frame. It is a number of patches: with larger patches, or larger frames, give another one.
        temperature: of the votes' weights, exp(cosine / temperature).
    """

    size: int | tuple[int, int] | None = None
    context: int = 7
    k: int = 5
    radius: int = 12
    temperature: float = 0.1

    def validate(self) -> None:
        """Checks every number's range.

        Raises:
            PlanError: naming the option, its range, and what came.
        """
        at_least(self, context=0, k=1, radius=0)
        positive(self, "temperature")


@dataclass(frozen=True)
class MatchingOptions:
    """How keypoints are matched.

    Attributes:
        size: height and width in pixels at which photos are shown, or one number for a square. Without it, their own,
            rounded to the patch grid.
        alpha: a match is right within this share of the larger side of the target object's box; each share that is
            given is a line of results.
        upsample: by what the target's features are interpolated before the best place is looked for; 1 takes the
            patches as they are.
    """

    size: int | tuple[int, int] | None = None
    alpha: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2)
    upsample: int = 1

    def validate(self) -> None:
        """Checks every number's range.

        Raises:
            PlanError: naming the option, its range, and what came.
        """
        different = len(set(self.alpha)) == len(self.alpha) > 0
        if not (different and all(0 < one < math.inf for one in self.alpha)):
            raise PlanError(f"alpha must be one positive number or more, all different, got {self.alpha}")
        at_least(self, upsample=1)
