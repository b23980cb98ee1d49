"""Options of the tasks and of their stage 1, and range checks. No heavy imports."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar, get_args

from denoising_vit.decomposition.options import DenoiseOptions, ExactOptions
from denoising_vit.errors import PlanError, require_at_least


def at_least(options: Any, **least: int) -> None:
    """Raise PlanError unless each named option is at least this number, or None."""
    require_at_least(options, least, PlanError)


def positive(options: Any, *names: str) -> None:
    """Raise PlanError unless each named option is a positive number, or None."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise PlanError(f"{name} must be a positive number, got {value}")


def different(options: Any, **least: int) -> None:
    """Raise PlanError unless each named option is a list of one or more different numbers of at least this value."""
    for name, number in least.items():
        values = getattr(options, name)
        if not values or min(values) < number or len(set(values)) < len(values):
            raise PlanError(f"{name} must be one or more different numbers of at least {number}, got {values}")


Preset = Literal["paper", "quick"]


#: Cut pads off, or stretch the patch grid over a crop as if there were no pads.
Pads = Literal["cut", "stretched"]


@dataclass(frozen=True)
class ProbeProtocol(ABC):
    """Training of a linear probe; subclasses add the inputs and the evaluation.

    Attributes:
        preset: name of the preset.
        steps: number of optimizer steps.
        warmup: steps of linear warm-up.
        batch: images per step.
        learning_rate: maximum learning rate.
        weight_decay: weight decay of AdamW.
        gradient_limit: maximum norm of the gradients; None disables clipping.
    """

    preset: Preset
    steps: int
    warmup: int
    batch: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    gradient_limit: float | None = None

    @abstractmethod
    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step, 0 to steps - 1."""

    def momentum_at(self, step: int) -> float:
        """AdamW's first beta of a step, 0 to steps - 1."""
        return 0.9


AProtocol = TypeVar("AProtocol", bound=ProbeProtocol)


@dataclass(frozen=True)
class ProbeOptions:
    """Options of a linear probe; omitted options take the preset's value.

    Attributes:
        preset: paper is the published protocol (hours on a GPU); quick trains on features of whole images, computed
            once (minutes on a CPU).
        seeds: seeds of the probes; one probe is trained and evaluated per seed.
        size: quick only: height and width of the model's input in pixels, or one number for a square. Defaults to the
            image's own size, rounded to the patch grid.
        steps: number of optimizer steps; the warm-up scales with it.
        batch: images per step.
        learning_rate: maximum learning rate.
        weight_decay: weight decay of AdamW.
    """

    preset: Preset = "quick"
    seeds: tuple[int, ...] = (0, 1, 2)
    size: int | tuple[int, int] | None = None
    steps: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None

    def applied(self, base: AProtocol, shown: str) -> AProtocol:
        """The preset's protocol with the given options."""
        if self.size is not None and self.preset == "paper":
            raise PlanError(f"size applies to preset quick only; paper uses {shown}")
        different(self, seeds=0)
        at_least(self, steps=1, batch=1)
        positive(self, "learning_rate")
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise PlanError(f"weight_decay must be at least 0, got {self.weight_decay}")
        steps = self.steps or base.steps
        return replace(
            base,
            steps=steps,
            warmup=round(steps * base.warmup / base.steps),
            batch=self.batch or base.batch,
            learning_rate=self.learning_rate or base.learning_rate,
            weight_decay=base.weight_decay if self.weight_decay is None else self.weight_decay,
            size=self.size,
        )


def recorded(protocol: Any) -> dict[str, Any]:
    """Settings of a protocol for results, without newer settings at their defaults, so that old results stay valid."""
    always = {"pads": "cut", "together": None, "gradient_limit": None}
    return {name: value for name, value in asdict(protocol).items() if name not in always or value != always[name]}


def warmed(rate: float, step: int, warmup: int, start: float) -> float:
    """Learning rate after a linear warm-up that starts at ``start`` times this rate."""
    return rate if step >= warmup else rate * (1 - (1 - step / warmup) * (1 - start))


@dataclass(frozen=True)
class InputOptions:
    """The input size, an option of every task without training.

    Attributes:
        size: height and width of the model's input in pixels, or one number for a square. Defaults to the image's own
            size, rounded to the patch grid.
    """

    size: int | tuple[int, int] | None = None


@dataclass(frozen=True)
class KnnOptions(InputOptions):
    """Options of nearest-neighbour segmentation.

    Attributes:
        crops: whole images, or one neutral crop of each: a random square, upside down for half of the images, so that
            the position in the view carries no class information.
        k: number of neighbours that vote.
        temperature: temperature of the vote weights, exp(cosine / temperature).
        gallery: maximum number of training patches to compare with, spread evenly over the images; 0 uses all.
        seed: seed for the gallery and the crops.
    """

    crops: Literal["whole", "neutral"] = "whole"
    k: int = 20
    temperature: float = 0.07
    gallery: int = 60_000
    seed: int = 0

    def validate(self) -> None:
        """Raise PlanError if an option is out of range."""
        at_least(self, k=1, gallery=0, seed=0)
        positive(self, "temperature")


@dataclass(frozen=True)
class HummingbirdOptions(InputOptions):
    """Options of dense retrieval; defaults are the published values unless noted.

    Attributes:
        size: height and width of the model's input in pixels, or one number for a square. Defaults to the image's own
            size, rounded to the patch grid. Published: 504 for patches of 14 pixels, 512 for 16.
        k: number of neighbours to take labels from.
        temperature: temperature of the neighbours' weights, softmax(cosine / temperature).
        memory: maximum number of training patches in the memory bank, spread evenly over the images; 0 uses all.
            Published: 10,240,000, and 102,400 as the smallest.
        seed: seed for the choice of these patches.
    """

    k: int = 30
    temperature: float = 0.02
    memory: int = 102_400
    seed: int = 0

    def validate(self) -> None:
        """Raise PlanError if an option is out of range."""
        at_least(self, k=1, memory=0, seed=0)
        positive(self, "temperature")


@dataclass(frozen=True)
class ClusteringOptions(InputOptions):
    """Options of clustering.

    Attributes:
        clusters: numbers of clusters; one line of results each. Each cluster is mapped to its most frequent class; with
            as many clusters as classes there is a second line, with one cluster per class (Hungarian matching).
        patches: maximum number of patches to fit k-means on, spread evenly over the images; 0 uses all.
        seeds: seeds for k-means and the choice of these patches; scores are averaged over seeds.
    """

    clusters: tuple[int, ...] = (21, 100, 300)
    patches: int = 100_000
    seeds: tuple[int, ...] = (0, 1, 2)

    def validate(self) -> None:
        """Raise PlanError if an option is out of range."""
        at_least(self, patches=0)
        different(self, clusters=1, seeds=0)


#: Ranking of the patches of LOST.
SeedBy = Literal["degree", "norm"]


@dataclass(frozen=True)
class DiscoveryOptions(InputOptions):
    """Options of LOST, and the overlap that counts as found.

    Attributes:
        seed_by: degree starts from the patch with the fewest similar patches, as published for keys; norm from the
            patch with the largest feature norm.
        k: number of top-ranked patches that may support the seed.
        iou: minimum intersection over union with an object's box.
        centred: subtract the image's mean feature first. Patches are similar if their inner product is not negative,
            which is meaningful only for features centred at zero.
    """

    seed_by: SeedBy = "degree"
    k: int = 100
    iou: float = 0.5
    centred: bool = False

    def validate(self) -> None:
        """Raise PlanError if an option is out of range."""
        if self.seed_by not in get_args(SeedBy):
            raise PlanError(f"seed_by must be one of {', '.join(get_args(SeedBy))}, got {self.seed_by!r}")
        at_least(self, k=1)
        if not 0 < self.iou <= 1:
            raise PlanError(f"iou must be above 0 and at most 1, got {self.iou}")


@dataclass(frozen=True)
class PropagationOptions(InputOptions):
    """Options of label propagation; defaults are the published values, except for the size (Caron et al. 2021).

    Attributes:
        size: height and width of the model's input in pixels, or one number for a square. Defaults to the frame's own
            size, rounded to the patch grid. Published: 480 pixels high.
        context: number of previous frames to take labels from, in addition to the first.
        k: number of most similar patches in the context that vote; ties vote too.
        radius: radius of the search window around a patch, in patches; 0 for the whole frame. Adjust it to the patch
            and frame size.
        temperature: temperature of the vote weights, exp(cosine / temperature).
    """

    context: int = 7
    k: int = 5
    radius: int = 12
    temperature: float = 0.1

    def validate(self) -> None:
        """Raise PlanError if an option is out of range."""
        at_least(self, context=0, k=1, radius=0)
        positive(self, "temperature")


@dataclass(frozen=True)
class MatchingOptions(InputOptions):
    """Options of keypoint matching.

    Attributes:
        alpha: a match is correct within this fraction of the larger side of the target object's box; one line of
            results per value.
        upsample: upsampling factor of the target's features before the search; 1 for no upsampling.
    """

    alpha: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2)
    upsample: int = 1

    def validate(self) -> None:
        """Raise PlanError if an option is out of range."""
        different = len(set(self.alpha)) == len(self.alpha) > 0
        if not (different and all(0 < one < math.inf for one in self.alpha)):
            raise PlanError(f"alpha must be one or more different positive numbers, got {self.alpha}")
        at_least(self, upsample=1)


@dataclass(frozen=True)
class FieldOptions(ExactOptions):
    """Options of stage 1 on the images: by the exact method, once for all tasks.

    Attributes:
        size: height and width of a view in pixels, or one number for a square. Defaults to the size of the model's
            input, or to the backbone's default size if images differ in size.
        of: with crops of images (`--crops neutral`): crop fits each crop as an image, so that stage 1 sees the same
            pixels as other features; image fits whole images and samples their fields in the crops, which is not a fair
            comparison, because those fields saw the whole upright image.
    """

    of: Literal["crop", "image"] = "crop"

    def denoising(self) -> DenoiseOptions:
        """Convert to options of stage 1, without held-out views; PlanError if one is out of range."""
        own = {key: value for key, value in asdict(self).items() if key != "of"}
        options = DenoiseOptions(held_out=0, **own)
        options.validate()
        return options
