"""Options of stage 1 and of calibration. No heavy imports."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from denoising_vit.errors import PlanError, require_at_least
from denoising_vit.views.options import Coverage, CropOptions

#: Methods that fit views; all other methods take one pass over the whole photo.
STAGE_ONE = ("exact", "neural-field")

#: What an option affects: the result itself; the drawn views, which a plan's digest covers; the shapes of views and
#: field, which results contain; or nothing.
Decides = Literal["result", "views", "shape", "nothing"]

#: The recipe of the paper, or that of its released code.
Recipe = Literal["paper", "released"]

#: Default number of Adam steps.
_STEPS: dict[str, int] = {"paper": 20_000, "released": 25_000}


@dataclass(frozen=True)
class NeuralFieldOptions:
    """Model and training of the neural field. Defaults follow the paper (section 4.1 and appendix A).

    Attributes:
        recipe: paper follows the paper. released follows its released code: the loss times 1,024, never divided again,
            so that weight decay and eps act as if 1,024 times smaller; G initialised randomly with standard deviation
            0.02; the vertices of tiny-cuda-nn; once h is fitted, the cosine of F + G + h with the features, one step
            later; a learning rate that rises from 0 and does not quite reach the final one. The released views are a
            separate option (coverage released, 769 views).
        steps: number of Adam steps. Defaults to 20,000 as in the paper, or 25,000 as in the released code.
        tokens: number of tokens drawn per step, from all patches of all views.
        learning_rate: learning rate after the warm-up.
        final_learning_rate: learning rate at the last step, after a cosine decay.
        warm_up: fraction of the steps with a rising learning rate.
        beta1: first beta of Adam.
        beta2: second beta of Adam.
        eps: epsilon of Adam.
        weight_decay: weight decay of Adam, added to the gradient.
        levels: number of levels of the hash grid.
        coarsest: vertices per side of the first level.
        finest: vertices per side of the last level; a single level has the coarsest.
        level_channels: number of features per level.
        table_size: maximum number of vertices stored per level; a level with more is hashed.
        field_hidden: width of the field's network. Defaults to half the features' channels.
        residual_hidden: width of h's network. Defaults to a quarter of the features' channels.
        residual_from: fraction of the steps after which G is frozen and h is fitted; 1 never fits h.
        residual_weight: weight of the squared error of h.
        sparsity_weight: weight of the mean absolute value of h.
        shared_artifact: fit G; otherwise F (and h) explain everything.
        evaluate_every: number of steps between evaluations on the held-out views.
        keep: keep the result of the last step, as published, or of the best step on the held-out views.
    """

    recipe: Recipe = "paper"
    steps: int | None = None
    tokens: int = 2048
    learning_rate: float = 1e-2
    final_learning_rate: float = 1e-3
    warm_up: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-15
    weight_decay: float = 1e-5
    levels: int = 16
    coarsest: int = 16
    finest: int = 1024
    level_channels: int = 8
    table_size: int = 2**20
    field_hidden: int | None = None
    residual_hidden: int | None = None
    residual_from: float = 0.5
    residual_weight: float = 0.1
    sparsity_weight: float = 0.02
    shared_artifact: bool = True
    evaluate_every: int = 500
    keep: Literal["last", "best"] = "last"

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps."""
        return _STEPS[self.recipe] if self.steps is None else self.steps

    @property
    def first_with_residual(self) -> int:
        """The first step that fits h, counted from 0; at least the number of steps if h is never fitted."""
        begin = self.residual_from * self.total_steps
        return int(begin) + 1 if self.recipe == "released" else math.ceil(begin)

    def validate(self) -> None:
        """Check the ranges of all options.

        Raises:
            PlanError: with the option, its range, and its value.
        """
        counts = ("steps", "tokens", "levels", "level_channels", "table_size", "evaluate_every")
        rules: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
            ("at least 1", lambda value: value >= 1, (*counts, "field_hidden", "residual_hidden")),
            ("a positive number", lambda value: 0 < value < math.inf, ("learning_rate", "eps")),
            (
                "at least 0",
                lambda value: 0 <= value < math.inf,
                ("weight_decay", "residual_weight", "sparsity_weight", "final_learning_rate"),
            ),
            ("a fraction in [0, 1]", lambda value: 0 <= value <= 1, ("warm_up", "residual_from")),
            ("in [0, 1)", lambda value: 0 <= value < 1, ("beta1", "beta2")),
        )
        for allowed, holds, names in rules:
            for name in names:
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise PlanError(f"{name} must be {allowed}, got {value}")
        if not 2 <= self.coarsest <= self.finest:
            raise PlanError(f"coarsest must be at least 2 and at most finest, got {self.coarsest} and {self.finest}")
        if self.recipe not in _STEPS:
            raise PlanError(f"recipe must be 'paper' or 'released', got {self.recipe!r}")
        if self.keep not in ("last", "best"):
            raise PlanError(f"keep must be 'last' or 'best', got {self.keep!r}")


def _option(default: Any, decides: Decides = "result", method: str | None = None) -> Any:
    """A field of the options: what it affects, and the only method that uses it, if any."""
    return field(default=default, metadata={"decides": decides, "method": method})


@dataclass(frozen=True)
class StageOneCrops:
    """Crops for stage 1.

    Attributes:
        views: number of crops of each photo for stage 1, including the whole photo.
        area: minimum and maximum fraction of the photo that a crop of stage 1 covers.
        ratio: minimum and maximum aspect ratio (width / height) of such a crop, measured in the frame of the views.
        offsets: exact only; also fit a constant in each crop of stage 1.
    """

    views: int = _option(64, "views")
    area: tuple[float, float] = _option(CropOptions.area, "views")
    ratio: tuple[float, float] = _option(CropOptions.ratio, "views")
    offsets: bool = _option(False, method="exact")

    @property
    def as_published(self) -> set[str]:
        """Names of options at their published values. Records omit them, as they did before these options existed."""
        published = {"area": CropOptions.area, "ratio": CropOptions.ratio, "offsets": False}
        return {name for name, value in published.items() if getattr(self, name) == value}

    def as_denoising(self, **more: Any) -> DenoiseOptions:
        """Options of stage 1 with these crops, without held-out views."""
        crops = {each.name: getattr(self, each.name) for each in fields(StageOneCrops)}
        return DenoiseOptions(**crops, held_out=0, **more)


@dataclass(frozen=True)
class ExactOptions(StageOneCrops):
    """Options of the exact method.

    Attributes:
        views: number of crops of each photo, including the whole photo.
        area: minimum and maximum fraction of the photo that a crop covers. Wide crops, such as 0.4 to 1, keep the
            context of the whole photo, so 8 to 16 are enough. They separate artifact and content less well, so also
            give the backbone's artifact, or `none`.
        ratio: minimum and maximum aspect ratio (width / height) of a crop, measured in the frame of the views.
        size: height and width of a view in pixels, or one number for a square. Defaults to the backbone's own.
        resolution: number of nodes of the semantic field per side. Defaults to twice the patch grid.
        smoothness: exact only; weight of the penalty on differences within the semantic field.
        shrinkage: exact only; weight of the penalty on the artifact's magnitude.
        clip: exact only; scale down tokens whose norm exceeds the median by more than this number of median absolute
            deviations, to limit the influence of outliers; off by default.
        coverage: even covers borders nearly as often as the middle; plain draws crops as published; released renders
            views like the released code (whole pixels of the photo resized to the view, patches placed from edge to
            edge of a view), for the neural field's released recipe only.
        taper: exact only; fraction of a crop's side over which patch weights rise from the border inwards; with 0,
            seams appear where crops end.
        offsets: exact only; also fit a constant in each crop. The content of a crop shifts all of its features, and
            without these constants the field absorbs the shifts. Also give an artifact, or `none`. Held-out crops are
            scored with their best constants, so these scores cannot be compared with those without offsets.
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
    """Options for denoising a photo: the method, and the options of stage 1.

    Attributes:
        method: exact solves linear least squares; neural-field is the published gradient descent (published with 768
            views and plain coverage); subtract subtracts a known artifact from one pass over the whole photo; denoiser
            applies a trained denoiser to that pass (stage 2). One-pass methods (see `dvit show --features`) ignore all
            options below except the size. auto is the method of the given cleaner (exact for an artifact), else
            distilled or denoiser if the package has one for these weights, else exact.
        resolution: number of nodes of the semantic field per side. Defaults to twice the patch grid; three times with
            neural-field, so that patch centres are nodes.
        seed: seed for the crops and for the neural field's training; the same seed gives the same result.
        held_out: number of held-out crops to evaluate the fit on.
        batch_size: views per forward pass. Defaults to a number chosen for the device.
        neural: neural-field only; its options.
    """

    method: str = _option("exact")
    held_out: int = _option(8, "nothing")
    batch_size: int | None = _option(None, "nothing")
    neural: NeuralFieldOptions = _option(NeuralFieldOptions(), method="neural-field")  # noqa: RUF009, a field

    @classmethod
    def released(cls) -> DenoiseOptions:
        """Stage 1 as in the released code: the neural field on 768 crops and the whole photo, with 25,000 steps.

        The released code runs the backbone in float32.
        """
        neural = NeuralFieldOptions(recipe="released")
        return cls(method="neural-field", views=769, coverage="released", neural=neural)

    def validate(self) -> None:
        """Check everything that does not depend on the backbone.

        Raises:
            PlanError: with the option, its range, and its value.
        """
        least = {"views": 1, "held_out": 0, "batch_size": 1, "seed": 0, "smoothness": 0, "shrinkage": 0}
        require_at_least(self, least, PlanError)
        self.crops()
        if self.clip is not None and not self.clip > 0:
            raise PlanError(f"clip must be a positive number of median absolute deviations, got {self.clip}")
        if self.method == "neural-field":
            self.neural.validate()
            if self.neural.keep == "best" and not self.held_out:
                raise PlanError("keep 'best' needs held-out views; held_out must be at least 1, got 0")

    def crops(self) -> CropOptions:
        """Options for drawing crops.

        Raises:
            PlanError: if area, ratio or coverage is out of range.
        """
        return CropOptions(area=self.area, ratio=self.ratio, coverage=self.coverage)

    @classmethod
    def context(cls) -> DenoiseOptions:
        """The exact solver on 16 wide views, for a backbone with a known or weak artifact (docs/decisions.md)."""
        return cls(views=16, held_out=0, area=(0.4, 1.0))

    def recorded(self, *without: Decides) -> dict[str, Any]:
        """The options that the method uses, as JSON values.

        Args:
            without: omit options that affect this.
        """
        if self.method not in STAGE_ONE:
            return {"method": self.method, "size": self.size} if "shape" not in without else {"method": self.method}
        roles = {each.name: each.metadata["decides"] for each in fields(self)}
        if self.method == "neural-field":  # training uses the seed, and may select the best step on held-out views
            roles |= {"seed": "result", "held_out": "result"}
        unused = {each.name for each in fields(self) if each.metadata["method"] not in (None, self.method)}
        unused |= {name for name, role in roles.items() if role in without}
        unused |= self.as_published
        kept = {name: value for name, value in asdict(self).items() if name not in unused}
        return kept | {name: list(kept[name]) for name in ("area", "ratio") if name in kept}


@dataclass(frozen=True)
class CalibrationOptions(ExactOptions):
    """Options for estimating a backbone's artifact.

    Attributes:
        views: number of crops of each photo, including the whole photo; a few are enough, because all
            photos share the artifact.
        offsets: also fit a constant in each crop.
        seed: seed for the crops, and for the random halves to compare; the same seed gives the same artifact.
        batch_size: views per forward pass. Defaults to a number chosen for the device.
    """

    views: int = _option(16, "views")
    coverage: Literal["even", "plain"] = _option("even", "views")
    batch_size: int | None = _option(None, "nothing")

    def denoising(self) -> DenoiseOptions:
        """Convert to options of stage 1, without held-out views.

        Raises:
            PlanError: with the option, its range, and its value.
        """
        options = DenoiseOptions(held_out=0, **asdict(self))
        options.validate()
        if self.views < 2:
            raise PlanError(f"views must be at least 2, got {self.views}; one view per photo cannot separate G and F")
        return options
