"""Options of sheets of features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from denoising_vit.decomposition.options import DenoiseOptions, StageOneCrops
from denoising_vit.errors import PlanError
from denoising_vit.extractors import KINDS, GivenDenoiser, features_arg, parse_names
from denoising_vit.maps.titles import TITLES

if TYPE_CHECKING:
    from denoising_vit.backbones import Backbone

#: Kinds of maps, and their headings.
MAPS = dict(TITLES) | {
    "similarity": "similarity to ○",
    "artifact": "G",
    "artifact-norm": "|G|",
    "residual": "residual norm",
}


@dataclass(frozen=True)
class ShowOptions(StageOneCrops):
    """What a sheet shows of each photo.

    Attributes:
        features: names of features.
        maps: names separated by commas: pca, kmeans, norm, similarity (to the patch of --at), first, second and third
            (single components), foreground-pca, foreground; and of what was removed: artifact (G, in its own colours),
            artifact-norm, residual (the norm of raw minus clean minus G).
        at: place of the patch for similarity, as shares of height and width.
        clusters: number of k-means clusters.
        upsample: upsampling of clean features of stages 1 and 2.
        size: height and width of the input in pixels, or one number for a square; the backbone's own by default.
        seed: exact only; seed for the crops.
    """

    features: Annotated[
        str | None,
        features_arg("Without it, raw and denoiser if one is given or in the package for this backbone, else exact."),
    ] = None
    maps: str = "pca,kmeans,norm,similarity"
    at: tuple[float, float] = (0.5, 0.5)
    clusters: int = 6
    upsample: int = 1
    size: int | tuple[int, int] | None = None
    seed: int = DenoiseOptions.seed

    def validate(self) -> None:
        """Checks what does not depend on the backbone.

        Raises:
            PlanError: naming the option, its range and its value.
        """
        self.kinds()
        if self.features is not None:
            parse_names(self.features, KINDS)
        self.denoising().validate()
        for name in ("clusters", "upsample"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} must be a whole number of at least 1, got {getattr(self, name)}")
        if not all(0 <= place <= 1 for place in self.at):
            raise PlanError(f"at must be two shares of height and width, 0 to 1, got {self.at}")

    def kinds(self) -> tuple[str, ...]:
        """The maps, in order."""
        return parse_names(self.maps, tuple(MAPS), "maps")

    def names(self, backbone: Backbone, denoiser: GivenDenoiser | None) -> tuple[str, ...]:
        """The features, in order."""
        if self.features is not None:
            return parse_names(self.features, KINDS)
        from denoising_vit.denoiser.loading import find_shipped

        return "raw", "exact" if denoiser is None and find_shipped(backbone) is None else "denoiser"

    def denoising(self) -> DenoiseOptions:
        """Options of stage 1, without held-out views."""
        return DenoiseOptions(
            views=self.views, held_out=0, area=self.area, ratio=self.ratio, size=self.size, seed=self.seed
        )
