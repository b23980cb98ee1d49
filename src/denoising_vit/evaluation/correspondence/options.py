"""How correspondence is judged: options of the two tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from denoising_vit.errors import PlanError


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
        _at_least({"context": (self.context, 0), "k": (self.k, 1), "radius": (self.radius, 0)})
        _positive({"temperature": self.temperature})


@dataclass(frozen=True)
class MatchingOptions:
    """How keypoints are matched.

    Attributes:
        size: height and width in pixels at which photos are shown, or one number for a square. Without it, their own,
            rounded to the patch grid.
        alpha: a match is right within this share of the larger side of the target object's box.
        upsample: by what the target's features are interpolated before the best place is looked for; 1 takes the
            patches as they are.
    """

    size: int | tuple[int, int] | None = None
    alpha: float = 0.1
    upsample: int = 1

    def validate(self) -> None:
        """Checks every number's range.

        Raises:
            PlanError: naming the option, its range, and what came.
        """
        _positive({"alpha": self.alpha})
        _at_least({"upsample": (self.upsample, 1)})


def _at_least(options: dict[str, tuple[int, int]]) -> None:
    for name, (value, least) in options.items():
        if value < least:
            raise PlanError(f"{name} must be at least {least}, got {value}")


def _positive(options: dict[str, float]) -> None:
    for name, value in options.items():
        if not 0 < value < math.inf:
            raise PlanError(f"{name} must be a positive number, got {value}")
