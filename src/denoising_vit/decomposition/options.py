"""The options of stage 1."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from denoising_vit.decomposition.neural_field.options import NeuralFieldOptions
from denoising_vit.errors import PlanError
from denoising_vit.views.options import Coverage, CropOptions

#: Methods that fit views; all others take one pass over the whole photo.
STAGE_ONE = ("exact", "neural-field")

#: What an option decides: the result itself; the drawn views, which a plan's digest covers; the shape of views and
#: field, which results show themselves; or nothing.
Decides = Literal["result", "views", "shape", "nothing"]


def _option(default: Any, decides: Decides = "result", method: str | None = None) -> Any:
    """A field of the options: what it decides, and the only method that uses it, if any."""
    return field(default=default, metadata={"decides": decides, "method": method})


@dataclass(frozen=True)
class StageOneCrops:
    """Which crops stage 1 sees.

    Attributes:
        views: number of crops of each photo for stage 1, the whole photo included.
        area: least and largest share of the photo that a crop of stage 1 covers.
        ratio: least and largest width over height of such a crop, measured in the frame of the views.
        offsets: exact only; stage 1 also fits a constant in each crop.
    """

    views: int = _option(64, "views")
    area: tuple[float, float] = _option(CropOptions.area, "views")
    ratio: tuple[float, float] = _option(CropOptions.ratio, "views")
    offsets: bool = _option(False, method="exact")

    @property
    def as_published(self) -> set[str]:
        """The options with their published values. Records leave them out, as when there were no others."""
        published = {"area": CropOptions.area, "ratio": CropOptions.ratio, "offsets": False}
        return {name for name, value in published.items() if getattr(self, name) == value}

    def as_denoising(self, **more: Any) -> DenoiseOptions:
        """Options of stage 1 with these crops, without held-out views."""
        crops = {each.name: getattr(self, each.name) for each in fields(StageOneCrops)}
        return DenoiseOptions(**crops, held_out=0, **more)


@dataclass(frozen=True)
class ExactOptions(StageOneCrops):
    """How the exact method fits a photo.

    Attributes:
        views: number of crops of each photo, the whole photo included.
        area: least and largest share of the photo that a crop covers. Wide crops, such as 0.4 to 1, keep the context of
            the whole photo, and 8 to 16 suffice. They separate artifact from content less well, so also give the
            backbone's artifact, or `none`.
        ratio: least and largest width over height of a crop, measured in the frame of the views.
        size: height and width of a view in pixels, or one number for a square. Without it, the backbone's own.
        resolution: nodes of the semantic field along each side. Without it, twice the patch grid.
        smoothness: exact only; weight of the penalty on differences within the semantic field.
        shrinkage: exact only; weight of the penalty on the artifact's size.
        clip: exact only; scale down tokens whose norm is more than this many median absolute deviations above the
            median, so that outliers weigh less; off by default
        coverage: even sees borders nearly as often as the middle; plain draws crops as published; released makes views
            as the released code does (whole pixels of the photo squeezed to the size of a view, patches put from edge
            to edge of a view), for the neural field's released recipe only.
        taper: exact only; share of a crop's side over which its patches gain weight from the border inwards; without it
            (0), seams show where crops end.
        offsets: exact only; also fit a constant in each crop. What a crop shows shifts all of its features, and without
            these constants the field takes up the shifts. Give an artifact, or `none`, with it.
        seed: seed for the crops; the same seed gives the same result.
    """

    size: int | tuple[int, int] | None = _option(None, "shape")
    resolution: int | None = _option(None, "shape")
    smoothness: float = _option(1e-2, method="exact")
    shrinkage: float = _option(1e-3, method="exact")
    clip: float | None = _option(None, method="exact")
    coverage: Coverage = _option("even", "views")  # noqa: RUF009, a field
    taper: float = _option(0.3, "views", method="exact")
    seed: int = _option(0, "views")


@dataclass(frozen=True)
class DenoiseOptions(ExactOptions):
    """How a photo is denoised: the method, and how stage 1 is run.

    Attributes:
        method: exact solves linear least squares; neural-field is the published gradient descent (published with 768
            views and plain coverage); subtract removes a known artifact from one pass over the whole photo; denoiser
            applies a trained denoiser to it (stage 2). Methods of one pass (see `dvit show --features`) use only the
            size of the options below. auto is denoiser if one is given or in the package for these weights, else exact.
        resolution: nodes of the semantic field along each side. Without it, twice the patch grid; three times with
            neural-field, so that patch centres are nodes.
        seed: seed for the crops and for the neural field's training; the same seed gives the same result.
        held_out: number of held-out crops for judging the fit.
        batch_size: views in one forward pass. Without it, what suits the device.
        neural: neural-field only; its recipe.
    """

    method: str = _option("exact")
    held_out: int = _option(8, "nothing")
    batch_size: int | None = _option(None, "nothing")
    neural: NeuralFieldOptions = _option(NeuralFieldOptions(), method="neural-field")  # noqa: RUF009, a field

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

    def recorded(self, *without: Decides) -> dict[str, Any]:
        """The options of the method, as JSON values.

        Args:
            without: leave out options that decide this.
        """
        if self.method not in STAGE_ONE:
            return {"method": self.method, "size": self.size} if "shape" not in without else {"method": self.method}
        roles = {each.name: each.metadata["decides"] for each in fields(self)}
        if self.method == "neural-field":  # it trains with the seed, and may keep the best step on held-out views
            roles |= {"seed": "result", "held_out": "result"}
        unused = {each.name for each in fields(self) if each.metadata["method"] not in (None, self.method)}
        unused |= {name for name, role in roles.items() if role in without}
        unused |= self.as_published
        kept = {name: value for name, value in asdict(self).items() if name not in unused}
        return kept | {name: list(kept[name]) for name in ("area", "ratio") if name in kept}


@dataclass(frozen=True)
class CalibrationOptions(ExactOptions):
    """How the artifact of a backbone is found.

    Attributes:
        views: number of crops of each photo, the whole photo included; few suffice, since photos add up.
        seed: seed for the crops, and for the random halves that are compared; the same seed gives the same artifact.
        batch_size: views in one forward pass. Without it, what suits the device.
    """

    views: int = _option(16, "views")
    coverage: Literal["even", "plain"] = _option("even", "views")
    batch_size: int | None = _option(None, "nothing")

    def denoising(self) -> DenoiseOptions:
        """As options of stage 1, without held-out views.

        Raises:
            PlanError: naming the option, its range, and what came.
        """
        options = DenoiseOptions(held_out=0, **asdict(self))
        options.validate()
        if self.views < 2:
            raise PlanError(f"views must be at least 2, got {self.views}: one view of a photo cannot tell G from F")
        return options
