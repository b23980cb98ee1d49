"""How crops are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from denoising_vit.errors import PlanError

Coverage = Literal["even", "plain", "released"]


@dataclass(frozen=True)
class CropOptions:
    """How crops are drawn. Defaults are the published ones, but for ``coverage``.

    Attributes:
        area: least and largest share of the image that a crop covers.
        ratio: least and largest width over height, measured in the rendered frame.
        flip: probability of a horizontal flip.
        coverage: ``even`` lets boxes overhang the image by up to their own size and moves them back inside, so that
            borders and corners are seen nearly as often as the middle, and spreads the draws evenly (a low-discrepancy
            sequence); ``plain`` draws independent positions inside the image only, as published; ``released`` draws
            them as the released code does, on whole pixels of a view, and makes a released plan of them.
    """

    area: tuple[float, float] = (0.1, 0.5)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    coverage: Coverage = "even"

    def __post_init__(self) -> None:
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise PlanError(f"crop area must be two increasing shares in (0, 1], got {self.area}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise PlanError(f"crop ratio must be two increasing positive numbers, got {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise PlanError(f"flip must be a probability in [0, 1], got {self.flip}")
        if self.coverage not in get_args(Coverage):
            raise PlanError(f"coverage must be 'even', 'plain' or 'released', got {self.coverage!r}")
