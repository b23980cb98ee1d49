"""Options for drawing crops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from denoising_vit.errors import PlanError

Coverage = Literal["even", "plain", "released"]


@dataclass(frozen=True)
class CropOptions:
    """Options for drawing crops. Defaults are the published values, except for ``coverage``.

    Attributes:
        area: minimum and maximum fraction of the image that a crop covers.
        ratio: minimum and maximum aspect ratio (width / height), measured in the rendered frame.
        flip: probability of a horizontal flip.
        coverage: ``even`` lets boxes exceed the image by up to their own size and moves them back inside, so that
            borders and corners are covered nearly as often as the middle, and spreads the draws evenly (a
            low-discrepancy sequence); ``plain`` draws independent positions inside the image only, as published;
            ``released`` draws them like the released code, on whole pixels of a view, and gives a released plan.
    """

    area: tuple[float, float] = (0.1, 0.5)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    coverage: Coverage = "even"

    def __post_init__(self) -> None:
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise PlanError(f"crop area must be two increasing fractions in (0, 1], got {self.area}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise PlanError(f"crop ratio must be two increasing positive numbers, got {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise PlanError(f"flip must be a probability in [0, 1], got {self.flip}")
        if self.coverage not in get_args(Coverage):
            raise PlanError(f"coverage must be 'even', 'plain' or 'released', got {self.coverage!r}")
