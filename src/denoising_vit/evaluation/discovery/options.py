"""Options of object discovery."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from denoising_vit.errors import PlanError

#: What ranks patches.
SeedBy = Literal["degree", "norm"]


@dataclass(frozen=True)
class DiscoveryOptions:
    """How objects are found by LOST, and when one counts as found.

    Attributes:
        size: height and width in pixels at which images are shown, or one number for a square. Without it, their own,
            rounded to the patch grid.
        seed_by: degree starts from the patch with the fewest similar ones, as published for keys; norm from the one
            with the largest feature norm, for features whose norm tells objects.
        k: patches that come first after that, and may help the first to find the others.
        iou: least overlap with an object's box, intersection over union, at which it is found.
        centred: take the image's mean feature away first. Patches are similar where their inner product is not
            negative, which says something only of features around zero.
    """

    size: int | tuple[int, int] | None = None
    seed_by: SeedBy = "degree"
    k: int = 100
    iou: float = 0.5
    centred: bool = False

    def validate(self) -> None:
        """Checks every option's range.

        Raises:
            PlanError: naming the option, its range, and what came.
        """
        if self.seed_by not in get_args(SeedBy):
            raise PlanError(f"seed_by must be one of {', '.join(get_args(SeedBy))}, got {self.seed_by!r}")
        if self.k < 1:
            raise PlanError(f"k must be at least 1, got {self.k}")
        if not 0 < self.iou <= 1:
            raise PlanError(f"iou must be above 0 and at most 1, got {self.iou}")
