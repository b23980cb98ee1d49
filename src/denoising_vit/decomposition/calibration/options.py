"""The options of a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.errors import PlanError


@dataclass(frozen=True)
class CalibrationOptions:
    """How the artifact of a backbone is found.

    Attributes:
        views: crops of each photo, the whole photo included; few suffice, since photos add up.
        size: height and width of a view in pixels, or one number for a square. Without it, the backbone's own.
        resolution: nodes of each photo's semantic field along a side. Without it, twice the patch grid.
        smoothness: weight of the penalty on differences within the semantic fields.
        shrinkage: weight of the penalty on the artifact's size.
        clip: scale down tokens whose norm is more than this many median absolute deviations above the median. Without
            it, none are.
        coverage: even sees borders nearly as often as the middle; plain draws crops as published.
        area: least and largest share of the photo that a crop covers.
        ratio: least and largest width over height of a crop, measured in the frame of the views.
        taper: share of a crop's side over which its patches gain weight from the border inwards.
        seed: of the crops, and of the random halves that are compared; the same seed gives the same artifact.
        batch_size: views in one forward pass. Without it, what suits the device.
    """

    views: int = 16
    size: int | tuple[int, int] | None = None
    resolution: int | None = None
    smoothness: float = 1e-2
    shrinkage: float = 1e-3
    clip: float | None = None
    coverage: Literal["even", "plain"] = "even"
    area: tuple[float, float] = DenoiseOptions.area
    ratio: tuple[float, float] = DenoiseOptions.ratio
    taper: float = 0.3
    seed: int = 0
    batch_size: int | None = None

    def denoising(self) -> DenoiseOptions:
        """As options of stage 1, without views held out.

        Raises:
            PlanError: naming the option, its range, and what came.
        """
        options = DenoiseOptions(
            views=self.views,
            held_out=0,
            size=self.size,
            resolution=self.resolution,
            smoothness=self.smoothness,
            shrinkage=self.shrinkage,
            clip=self.clip,
            coverage=self.coverage,
            area=self.area,
            ratio=self.ratio,
            taper=self.taper,
            seed=self.seed,
            batch_size=self.batch_size,
        )
        options.validate()
        if self.views < 2:
            raise PlanError(f"views must be at least 2, got {self.views}: one view of a photo cannot tell G from F")
        return options
