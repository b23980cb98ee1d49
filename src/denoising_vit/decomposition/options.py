"""The options of stage 1."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from denoising_vit.decomposition.neural_field.options import NeuralFieldOptions
from denoising_vit.errors import PlanError
from denoising_vit.views.options import Coverage, CropOptions

#: Methods that fit views; all others take one pass over the whole photo.
STAGE_ONE = ("exact", "neural-field")

_EXACT_ONLY = ("smoothness", "shrinkage", "clip", "taper")


@dataclass(frozen=True)
class DenoiseOptions:
    """How a photo is denoised: the method, and how stage 1 is run.

    Attributes:
        method: exact solves linear least squares; neural-field is the published gradient descent (published with 768
            views and plain coverage); subtract takes a known artifact away from one pass over the whole photo, denoiser
            maps the features of that pass to clean ones (stage 2), and these, as all other clean features in one pass
            (see `dvit show --features`), use none of the options below but the size; auto is denoiser if one is given
            or in the package for these weights, else exact.
        views: crops of the photo that are fitted, the whole photo included.
        held_out: further crops, which only judge the fit.
        size: height and width of a view in pixels, or one number for a square. Without it, the backbone's own.
        resolution: nodes of the semantic field along each side. Without it, twice the patch grid; three times with
            neural-field, so that patch centres are nodes.
        smoothness: exact only; weight of the penalty on differences within the semantic field.
        shrinkage: exact only; weight of the penalty on the artifact's size.
        clip: exact only; scale down tokens whose norm is more than this many median absolute deviations above the
            median, so that outliers pull less. Without it, none are.
        coverage: even sees borders nearly as often as the middle; plain draws crops as published; released makes views
            as the released code does (whole pixels of the photo squeezed to the size of a view, patches put from edge
            to edge of a view), which hardly anything but the neural field's released recipe should use.
        area: least and largest share of the photo that a crop covers. Wide crops, such as 0.4 to 1, keep the context of
            the whole photo, and 8 to 16 of them do; but they tell artifact from content less well, so give the
            backbone's artifact with them, or `none`.
        ratio: least and largest width over height of a crop, measured in the frame of the views.
        taper: exact only; share of a crop's side over which its patches gain weight from the border inwards; without it
            (0), seams show where crops end.
        seed: of the crops and of the neural field's training; the same seed gives the same result.
        batch_size: views in one forward pass. Without it, what suits the device.
        neural: neural-field only; its recipe.
    """

    method: str = "exact"
    views: int = 64
    held_out: int = 8
    size: int | tuple[int, int] | None = None
    resolution: int | None = None
    smoothness: float = 1e-2
    shrinkage: float = 1e-3
    clip: float | None = None
    coverage: Coverage = "even"
    area: tuple[float, float] = CropOptions.area
    ratio: tuple[float, float] = CropOptions.ratio
    taper: float = 0.3
    seed: int = 0
    batch_size: int | None = None
    neural: NeuralFieldOptions = NeuralFieldOptions()  # noqa: RUF009, frozen

    @classmethod
    def released(cls) -> DenoiseOptions:
        """Stage 1 as the released code runs it: the neural field on 768 crops and the whole photo, 25,000 steps.

        The released code runs the backbone in float32.
        """
        neural = NeuralFieldOptions(recipe="released")
        return cls(method="neural-field", views=769, coverage="released", neural=neural)

    def validate(self) -> None:
        """Checks what does not depend on the backbone.

        Raises:
            PlanError: naming the option, its range, and what came.
        """
        least: dict[str, int] = {"views": 1, "held_out": 0, "batch_size": 1, "seed": 0, "smoothness": 0, "shrinkage": 0}
        for name, least_value in least.items():
            value = getattr(self, name)
            if value is not None and not value >= least_value:  # NaN is not
                raise PlanError(f"{name} must be at least {least_value}, got {value}")
        self.crops()
        if self.clip is not None and not self.clip > 0:
            raise PlanError(f"clip must be a positive number of median absolute deviations, got {self.clip}")
        if self.method == "neural-field":
            self.neural.validate()
            if self.neural.keep == "best" and not self.held_out:
                raise PlanError("keep is 'best', which held-out views decide; held_out must be at least 1")

    def crops(self) -> CropOptions:
        """How crops are drawn.

        Raises:
            PlanError: if area, ratio or coverage is out of range.
        """
        return CropOptions(area=self.area, ratio=self.ratio, coverage=self.coverage)

    @classmethod
    def context(cls) -> DenoiseOptions:
        """The exact solver on 16 wide views, for a backbone whose artifact is known or weak (docs/decisions.md)."""
        return cls(views=16, held_out=0, area=(0.4, 1.0))

    def recorded(self) -> dict[str, Any]:
        """The options that decide the result of the method, as JSON values.

        The published areas and ratios of crops are left out, as in records from when there were no others.
        """
        if self.method not in STAGE_ONE:
            return {"method": self.method, "size": self.size}
        unused = {"neural"} if self.method == "exact" else set(_EXACT_ONLY)
        unused |= {name for name in ("area", "ratio") if getattr(self, name) == getattr(CropOptions, name)}
        kept = {name: value for name, value in asdict(self).items() if name not in unused}
        return kept | {name: list(kept[name]) for name in ("area", "ratio") if name in kept}
