"""Options of a diagnosis."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from denoising_vit.decomposition.options import CalibrationOptions, StageOneCrops
from denoising_vit.errors import PlanError

#: Files of a diagnosis, and the kinds of their marks.
WRITTEN = {"diagnosis.json": "diagnosis", "diagnosis.html": "diagnosis-page"}


@dataclass(frozen=True)
class DiagnoseOptions(StageOneCrops):
    """Options of a diagnosis.

    Attributes:
        views: number of crops of each photo for stage 1, including the whole photo; few suffice, because all photos
            share the artifact.
        size: height and width of a view in pixels, or one number for a square; the backbone's own by default.
        clip: scale down tokens with norms more than this many median absolute deviations above the median before
            fitting, so that outlier tokens matter less; off if None.
        shown: number of photos with maps on the page.
        seed: seed for crops and probes.
        batch_size: views per forward pass; chosen for the device by default.
    """

    views: int = 8
    size: int | tuple[int, int] | None = None
    clip: float | None = 6.0
    shown: int = 6
    seed: int = 0
    batch_size: int | None = None

    def calibration(self) -> CalibrationOptions:
        """Options of the calibration.

        Raises:
            PlanError: naming the option, its range and its value.
        """
        if self.shown < 0:
            raise PlanError(f"shown must be 0 or more, got {self.shown}")
        shared = {name: value for name, value in asdict(self).items() if name != "shown"}
        options = CalibrationOptions(**shared)
        options.denoising()
        return options

    def recorded(self) -> dict[str, Any]:
        """The options for the record."""
        return {name: value for name, value in asdict(self).items() if name not in self.as_published}
