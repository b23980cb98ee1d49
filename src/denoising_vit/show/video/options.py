"""The options of a video of features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal

from denoising_vit.errors import PlanError
from denoising_vit.extractors import KINDS, features_arg, parse_names
from denoising_vit.maps.titles import TITLES

#: Panels, and their headings.
PANELS: Mapping[str, str] = {"image": "image", "pca": "PCA", "dataset-pca": "data-set PCA"} | {
    kind: title for kind, title in TITLES.items() if kind != "pca"
}

#: Longest side of the patch grid's image where none is asked for, in pixels; what DINOv2 was trained for at its end.
LONG_SIDE = 518

#: Options that change nothing in the frames.
_INDIFFERENT = ("palette", "batch_size")


@dataclass(frozen=True)
class VideoOptions:
    """What a video shows, and how.

    Attributes:
        features: names of features.
        panels: one column each: image, pca (in the basis of this clip), dataset-pca (in that of --palette), kmeans,
            first, second, third (principal components), foreground-pca, norm, foreground (by the mapping of --palette
            where it is given, else of this clip); separated by commas.
        size: side of the frames that the backbone is shown, in pixels. Without it, about 518 for the long side. The
            other one follows from the aspect ratio; both go to the nearest whole patch.
        side: which side `size` is of, long or short.
        panel_size: long side of each panel in pixels.
        smooth: draw maps smoothly instead of with sharp patches.
        palette: colours of a data set: a file of a saved palette.
        every: take every so many-th frame; each is then shown for so much longer.
        max_frames: stop after so many frames of the result.
        fps: frames a second of a folder of frames, which tells none; a video keeps its own times.
        frames: write every frame as a PNG as well.
        basis_frames: frames, evenly spread over the clip, that colours are settled on.
        part_frames: frames in each part that is kept while a video is unfinished.
        views: of exact; crops of every frame that are fitted.
        batch_size: frames in one forward pass. Without it, what suits the device.
    """

    features: Annotated[str, features_arg("One row each; exact takes minutes for a second of video.")] = "raw,denoiser"
    panels: str = "image,pca"
    size: int | None = None
    side: Literal["long", "short"] = "long"
    panel_size: int = 480
    smooth: bool = False
    palette: str | None = None
    every: int = 1
    max_frames: int | None = None
    fps: float = 24.0
    frames: bool = False
    basis_frames: int = 16
    part_frames: int = 48
    views: int = 64
    batch_size: int | None = None

    def validate(self) -> None:
        """Checks what does not depend on the backbone.

        Raises:
            PlanError: naming the option, its range, and what came.
        """
        parse_names(self.features, KINDS)
        if "dataset-pca" in self.shown and self.palette is None:
            raise PlanError("the panel dataset-pca needs the colours of a data set: --palette FILE, a saved palette")
        least = {"size": 1, "panel_size": 64, "every": 1, "max_frames": 1, "basis_frames": 1, "part_frames": 1}
        for name, value in (least | {"views": 2, "batch_size": 1}).items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise PlanError(f"{name} must be at least {value}, got {given}")
        if self.side not in ("long", "short"):
            raise PlanError(f"side must be 'long' or 'short', got {self.side!r}")
        if not (math.isfinite(self.fps) and 0.01 <= self.fps <= 1000):
            raise PlanError(f"fps must be 0.01 to 1000 frames a second, got {self.fps}")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the features, in order."""
        return parse_names(self.features, KINDS)

    @property
    def shown(self) -> tuple[str, ...]:
        """Names of the panels, in order."""
        return parse_names(self.panels, tuple(PANELS), "panels")

    @property
    def rate(self) -> Fraction:
        """Frames a second of a folder; 23.976 and 29.97 are what they stand for."""
        broadcast = Fraction(round(self.fps * 1.001) * 1000, 1001)
        told = Fraction(self.fps).limit_denominator(1000)
        return broadcast if told.denominator > 1 and abs(broadcast - told) < Fraction(5, 1000) else told

    def recorded(self) -> dict[str, Any]:
        """The options that decide the frames, as JSON values."""
        return {name: value for name, value in asdict(self).items() if name not in _INDIFFERENT}
