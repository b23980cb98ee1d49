"""The options of a diagnosis."""

from __future__ import annotations

from dataclasses import dataclass

from denoising_vit.decomposition.calibration.options import CalibrationOptions
from denoising_vit.errors import PlanError


@dataclass(frozen=True)
class DiagnoseOptions:
    """How much is looked at.

    Attributes:
        views: crops of each photo that stage 1 is fitted on, the whole photo included; with the artifact known from
            all photos together, few suffice.
        size: height and width of a view in pixels, or one number for a square. Without it, the backbone's own.
        clip: scale down tokens whose norm is more than this many median absolute deviations above the median before
            they are fitted, so that outlier tokens pull less on what is cleaned. Without it, none are.
        shown: photos whose maps are kept for the page.
        seed: of the crops and probes; the same seed gives the same diagnosis.
        batch_size: views in one forward pass. Without it, what suits the device.
    """

    views: int = 8
    size: int | tuple[int, int] | None = None
    clip: float | None = 6.0
    shown: int = 6
    seed: int = 0
    batch_size: int | None = None

    def calibration(self) -> CalibrationOptions:
        """As options of a calibration.

        Raises:
            PlanError: naming the option, its range, and what came.
        """
        if self.shown < 0:
            raise PlanError(f"shown must be 0 or more, got {self.shown}")
        options = CalibrationOptions(
            views=self.views, size=self.size, clip=self.clip, seed=self.seed, batch_size=self.batch_size
        )
        options.denoising()
        return options
