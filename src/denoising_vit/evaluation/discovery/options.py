"""Options of object discovery."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from denoising_vit.errors import PlanError
from denoising_vit.evaluation.options import at_least

#: Ranking of the patches.
SeedBy = Literal["degree", "norm"]


@dataclass(frozen=True)
class DiscoveryOptions:
    """Options of LOST, and the overlap at which an object counts as found.

    Attributes:
        size: height and width of the model's input in pixels, or one number for a square. Without it, the image's
            own, rounded to the patch grid.
        seed_by: degree starts from the patch with the fewest similar ones, as published for keys; norm from the one
            with the largest feature norm.
        k: number of next patches in the ranking that may help the first to find the others.
        iou: least intersection over union with an object's box.
        centred: subtract the image's mean feature first. Patches are similar if their inner product is not negative,
            which is meaningful only for features around zero.
    """

    size: int | tuple[int, int] | None = None
    seed_by: SeedBy = "degree"
    k: int = 100
    iou: float = 0.5
    centred: bool = False

    def validate(self) -> None:
        """Check the range of every option.

        Raises:
            PlanError: naming the option, its range and its value.
        """
        if self.seed_by not in get_args(SeedBy):
            raise PlanError(f"seed_by must be one of {', '.join(get_args(SeedBy))}, got {self.seed_by!r}")
        at_least(self, k=1)
        if not 0 < self.iou <= 1:
            raise PlanError(f"iou must be above 0 and at most 1, got {self.iou}")
