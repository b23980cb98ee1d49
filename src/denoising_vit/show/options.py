"""Options of sheets, of videos and their derived sizes, and of the browser page."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from denoising_vit.decomposition.options import DenoiseOptions, StageOneCrops
from denoising_vit.errors import AppError, ClipError, PlanError, require_at_least
from denoising_vit.extractors import KINDS, Cleaners, features_arg, parse_names
from denoising_vit.maps.kinds import MAP_KINDS, TITLES
from denoising_vit.views.patch_grid import nearest_sizes

if TYPE_CHECKING:
    from denoising_vit.backbones import Backbone


@dataclass(frozen=True)
class ShowOptions(StageOneCrops):
    """Options of a sheet.

    Attributes:
        features: names of features.
        maps: names separated by commas: pca, kmeans, norm, similarity (to the patch of --at), first, second and third
            (single components), foreground-pca, foreground; and of what was removed: artifact (G, in its own colours),
            artifact-norm, residual (the norm of raw minus clean minus G).
        at: position of the patch for similarity, as fractions of height and width.
        clusters: number of k-means clusters.
        upsample: upsampling factor of clean features of stages 1 and 2.
        size: height and width of the input in pixels, or one number for a square; defaults to the backbone's own.
        seed: exact only; seed for the crops.
    """

    features: Annotated[
        str | None,
        features_arg(
            "Without it, raw and those of the given cleaner (exact for an artifact), else distilled or denoiser if the "
            "package has one for this backbone, else exact."
        ),
    ] = None
    maps: str = "pca,kmeans,norm,similarity"
    at: tuple[float, float] = (0.5, 0.5)
    clusters: int = 6
    upsample: int = 1
    size: int | tuple[int, int] | None = None
    seed: int = DenoiseOptions.seed

    def validate(self) -> None:
        """Check everything that does not depend on the backbone.

        Raises:
            PlanError: with the option, its range and its value.
        """
        self.kinds()
        if self.features is not None:
            parse_names(self.features, KINDS)
        self.denoising().validate()
        for name in ("clusters", "upsample"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} must be a whole number of at least 1, got {getattr(self, name)}")
        if not all(0 <= place <= 1 for place in self.at):
            raise PlanError(f"at must be two fractions of height and width, 0 to 1, got {self.at}")

    def kinds(self) -> tuple[str, ...]:
        """Names of the maps, in order."""
        return parse_names(self.maps, tuple(MAP_KINDS), "maps")

    def names(self, backbone: Backbone, cleaners: Cleaners) -> tuple[str, ...]:
        """Names of the features, in order."""
        if self.features is not None:
            return parse_names(self.features, KINDS)
        return "raw", cleaners.preferred(backbone)

    def denoising(self) -> DenoiseOptions:
        """Options of stage 1, without held-out views."""
        return self.as_denoising(size=self.size, seed=self.seed)


#: Panels and their headings.
PANELS = {"image": "image", "pca": TITLES["pca"], "dataset-pca": "data-set PCA"} | dict(TITLES)

#: Default long side in pixels of the backbone's input for frames: the final resolution of DINOv2's training.
LONG_SIDE = 518

#: Options that do not change the frames.
_INDIFFERENT = ("palette", "batch_size")

_LEAST: dict[str, float] = {
    **dict.fromkeys(("size", "every", "max_frames", "basis_frames", "part_frames", "batch_size"), 1),
    "panel_size": 64,
    "views": 2,
}


@dataclass(frozen=True)
class VideoOptions(StageOneCrops):
    """Options of a video.

    Attributes:
        features: names of features; None for raw and clean ones, see :meth:`with_features`.
        panels: one column each, separated by commas: image, pca (in the basis of this clip), dataset-pca (in that of
            --palette), kmeans, first, second, third (principal components), foreground-pca, norm, foreground (from
            --palette if given, else from this clip).
        size: side in pixels of the backbone's input for frames, rounded to whole patches; defaults to about 518 for the
            long side. The other side follows from the aspect ratio.
        side: the side that `size` sets, long or short.
        panel_size: long side of each panel in pixels.
        smooth: interpolate maps instead of showing sharp patches.
        palette: file of `dvit show --save-palette`, with the colours of a data set.
        every: use every n-th frame; each is shown n times as long.
        max_frames: maximum number of frames in the result.
        fps: frames per second of a folder of frames; a video keeps its own times.
        frames: also write every frame as a PNG.
        basis_frames: number of frames, spread evenly over the clip, to fit colours on.
        part_frames: number of frames per part; finished parts survive an interruption.
        batch_size: frames per forward pass; defaults to a number chosen for the device.
    """

    features: Annotated[
        str | None,
        features_arg(
            "One row each; exact takes minutes for a second of video. Without it, raw and those of the given cleaner "
            "(subtract for an artifact), else distilled or denoiser if the package has one for this backbone, else "
            "project."
        ),
    ] = None
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
    batch_size: int | None = None

    def validate(self) -> None:
        """Check everything that does not depend on the backbone.

        Raises:
            PlanError: with the option, its range and its value.
        """
        if self.features is not None:
            parse_names(self.features, KINDS)
        if "dataset-pca" in self.shown and self.palette is None:
            raise PlanError("the panel dataset-pca needs a saved palette of a data set; give --palette FILE")
        require_at_least(self, _LEAST, PlanError)
        self.as_denoising().crops()
        if self.side not in ("long", "short"):
            raise PlanError(f"side must be 'long' or 'short', got {self.side!r}")
        if not (math.isfinite(self.fps) and 0.01 <= self.fps <= 1000):
            raise PlanError(f"fps must be 0.01 to 1000 frames per second, got {self.fps}")

    def with_features(self, backbone: Backbone, cleaners: Cleaners) -> VideoOptions:
        """These options with names of features: if none are given, raw and clean ones of one forward pass."""
        if self.features is not None:
            return self
        clean = cleaners.preferred(backbone)
        if not KINDS[clean].one_pass:
            clean = "project" if cleaners.artifact is None else "subtract"
        return replace(self, features=f"raw,{clean}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the features, in order; if none are given, only after :meth:`with_features`."""
        assert self.features is not None
        return parse_names(self.features, KINDS)

    @property
    def shown(self) -> tuple[str, ...]:
        """Names of the panels, in order."""
        return parse_names(self.panels, tuple(PANELS), "panels")

    @property
    def rate(self) -> Fraction:
        """Frames per second of a folder; 23.976 and 29.97 stand for 24000/1001 and 30000/1001."""
        broadcast = Fraction(round(self.fps * 1.001) * 1000, 1001)
        given = Fraction(self.fps).limit_denominator(1000)
        return broadcast if given.denominator > 1 and abs(broadcast - given) < Fraction(5, 1000) else given

    def recorded(self) -> dict[str, Any]:
        """The options that determine the frames, as JSON values."""
        without = self.as_published.union(_INDIFFERENT)
        kept = {name: value for name, value in asdict(self).items() if name not in without}
        return kept | {name: list(kept[name]) for name in ("area", "ratio") if name in kept}


def shown_size(size: tuple[int, int], backbone: Backbone, options: VideoOptions) -> tuple[int, int]:
    """(H, W) of the backbone's input for frames of (H, W) pixels: the same aspect ratio, to the nearest whole patch.

    Raises:
        ClipError: if a side would be smaller than a patch.
    """
    measured = max(size) if options.side == "long" else min(size)
    scale = (options.size or LONG_SIDE) / measured
    ideal = tuple(side * scale for side in size)
    if min(ideal) < backbone.patch_size / 2:
        raise ClipError(
            f"frames of {size[1]} x {size[0]} pixels would be resized to {ideal[1]:.0f} x {ideal[0]:.0f}, less than "
            f"one patch of {backbone.patch_size} pixels; increase --size"
        )
    height, width = (
        min(nearest_sizes(round(side), backbone.patch_size, backbone.stride), key=lambda fitting: abs(fitting - side))
        for side in ideal
    )
    return height, width


def panel_size(size: tuple[int, int], options: VideoOptions) -> tuple[int, int]:
    """(H, W) of a panel for frames of (H, W) pixels, at their aspect ratio; even, as H.264 requires."""
    scale = options.panel_size / max(size)
    height, width = (max(2, 2 * round(side * scale / 2)) for side in size)
    return height, width


#: Maximum `max_upload` in megabytes, because an upload is kept in memory.
MOST_UPLOAD = 1000.0


@dataclass(frozen=True)
class AppOptions:
    """Address and limits of the page.

    Attributes:
        host: address to listen on; 127.0.0.1 is reachable from this computer only, 0.0.0.0 from the whole network.
        port: port, 1 to 65535.
        share: also open a public internet address through Gradio's relay; anyone with the address can use the page, and
            photos and results pass through the relay.
        max_upload: maximum size of an uploaded photo in MB.
        examples: folder with more sample photos, visible to everyone who reaches the page.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False
    max_upload: float = 20.0
    examples: Path | None = None

    def validate(self) -> None:
        """Check the options before anything is loaded.

        Raises:
            AppError: with the option, its range and its value.
        """
        if not 1 <= self.port <= 65535:
            raise AppError(f"port must be 1 to 65535, got {self.port}")
        if not 0 < self.max_upload <= MOST_UPLOAD:
            raise AppError(f"max_upload must be more than 0 and at most {MOST_UPLOAD:g} MB, got {self.max_upload:g}")
        if self.examples is not None and not self.examples.is_dir():
            raise AppError(f"examples must be a folder with photos, got {self.examples}, which is not a folder")

    @property
    def local(self) -> bool:
        """True if the page is reachable from this computer only."""
        try:
            return ipaddress.ip_address(self.host).is_loopback and not self.share
        except ValueError:
            return self.host == "localhost" and not self.share
