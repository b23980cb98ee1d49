"""Options of a diagnosis."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from denoising_vit.decomposition.options import CalibrationOptions
from denoising_vit.errors import PlanError

#: Files of a diagnosis, and the kinds of their marks.
WRITTEN = {"diagnosis.json": "diagnosis", "diagnosis.html": "diagnosis-page"}

#: Options in every record. Records leave out all others at their defaults, so that a new option changes no old record.
_ALWAYS = ("views", "size", "clip", "seed", "batch_size", "shown")


@dataclass(frozen=True)
class DiagnoseOptions(CalibrationOptions):
    """Options of a diagnosis, and of the calibration within it.

    Attributes:
        views: number of crops of each photo for stage 1, including the whole photo; few suffice, because all photos
            share the artifact.
        clip: scale down tokens with norms more than this many median absolute deviations above the median before
            fitting, so that outlier tokens matter less; off if None.
        shown: number of photos with maps on the page.
        seed: seed for crops and probes.
    """

    views: int = 8
    clip: float | None = 6.0
    seed: int = 0
    shown: int = 6

    def calibration(self) -> CalibrationOptions:
        """Options of the calibration.

        Raises:
            PlanError: naming the option, its range and its value.
        """
        if self.shown < 0:
            raise PlanError(f"shown must be 0 or more, got {self.shown}")
        options = CalibrationOptions(**{name: value for name, value in asdict(self).items() if name != "shown"})
        options.denoising()
        return options

    def recorded(self) -> dict[str, Any]:
        """The options for the record."""
        defaults = {each.name: each.default for each in fields(self)}
        return {name: value for name, value in asdict(self).items() if name in _ALWAYS or value != defaults[name]}
