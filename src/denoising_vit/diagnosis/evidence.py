"""What a diagnosis looks at: features of the same crops, raw and cleaned, and the artifact that photos share."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from denoising_vit.decomposition.calibration.calibrate import Calibration
from denoising_vit.metrics.blank_test import BlankProbe


@dataclass(frozen=True, eq=False)
class Shown:
    """A photo for the page: its pixels (H, W, 3) uint8, reduced, and its maps (h, w, C) by source."""

    name: str
    pixels: np.ndarray
    maps: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Evidence:
    """Features by source: ``raw``, ``subtract``, ``exact``, and whatever else was to be judged.

    Attributes:
        crops: of one neutral crop a photo, (N, h, w, C). The first half was cleaned with the artifact of the second
            half's photos and the other way round; turned and upright crops take turns.
        pairs: features of places as the whole photo has them, and as the crop has them, (n, h, w, C) both; of crops
            that are not turned.
        calibration: the artifact of all photos together, and how far they agree; names what was skipped.
        responses: to an all-black and an all-mean image, (2, h, w, C).
        shown: a few photos with their maps.
        blank: features of the blank-image test by source, without ``exact``, which is no one pass.
    """

    crops: dict[str, Tensor]
    pairs: dict[str, tuple[Tensor, Tensor]]
    calibration: Calibration
    responses: Tensor
    shown: tuple[Shown, ...]
    blank: dict[str, BlankProbe] = field(default_factory=dict)
