"""Options of a diagnosis."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from denoising_vit.decomposition.options import CalibrationOptions
from denoising_vit.errors import PlanError

#: Files of a diagnosis, and the kinds of their marks.
WRITTEN = {"diagnosis.json": "diagnosis", "diagnosis.html": "diagnosis-page"}

#: Options in every record. Other options are omitted at their defaults, so that a new option changes no old record.
_ALWAYS = ("views", "size", "clip", "seed", "batch_size", "shown")


@dataclass(frozen=True)
class DiagnoseOptions(CalibrationOptions):
    """Options of a diagnosis and of its calibration.

    Attributes:
        views: number of crops of each photo for stage 1, including the whole photo; a few are enough, because all
            photos share the artifact.
        clip: before fitting, scale down tokens whose norm exceeds the median by more than this number of median
            absolute deviations, to limit the influence of outlier tokens; off if None.
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
            PlanError: with the option, its range and its value.
        """
        if self.shown < 0:
            raise PlanError(f"shown must be at least 0, got {self.shown}")
        options = CalibrationOptions(**{name: value for name, value in asdict(self).items() if name != "shown"})
        options.denoising()
        return options

    def recorded(self) -> dict[str, Any]:
        """The options for the record."""
        defaults = {each.name: each.default for each in fields(self)}
        return {name: value for name, value in asdict(self).items() if name in _ALWAYS or value != defaults[name]}
