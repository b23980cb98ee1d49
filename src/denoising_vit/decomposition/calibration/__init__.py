"""The artifact of a backbone, found once from a few dozen photos, and how far it can be trusted."""

from denoising_vit.decomposition.calibration.calibrate import (
    Calibration,
    OnPhoto,
    calibrate,
    doubt_about,
    energy_of,
    joined,
    require_enough,
    run_calibration,
)
from denoising_vit.decomposition.calibration.options import CalibrationOptions
from denoising_vit.decomposition.calibration.photos import named_pixels, telling
from denoising_vit.decomposition.calibration.stability import Stability

__all__ = [
    "Calibration",
    "CalibrationOptions",
    "OnPhoto",
    "Stability",
    "calibrate",
    "doubt_about",
    "energy_of",
    "joined",
    "named_pixels",
    "require_enough",
    "run_calibration",
    "telling",
]
