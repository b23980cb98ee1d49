"""Options of linear probes, and range checks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from denoising_vit.errors import PlanError


def at_least(options: Any, **least: int) -> None:
    """Raises PlanError unless each named option is this number or more."""
    for name, number in least.items():
        if getattr(options, name) < number:
            raise PlanError(f"{name} must be at least {number}, got {getattr(options, name)}")


def positive(options: Any, *names: str) -> None:
    """Raises PlanError unless each named option is a positive number."""
    for name in names:
        if not 0 < getattr(options, name) < math.inf:
            raise PlanError(f"{name} must be a positive number, got {getattr(options, name)}")


Preset = Literal["paper", "quick"]


#: Whether pads are cut off, or the patch grid is stretched over a crop as if there were none.
Pads = Literal["cut", "stretched"]


class Trainable(Protocol):
    """What the protocols of all probes say: a dataclass with these fields."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def steps(self) -> int:
        """Of the optimiser."""
        ...

    @property
    def warmup(self) -> int:
        """Steps of them in which the rate rises."""
        ...

    @property
    def batch(self) -> int:
        """Images a step."""
        ...

    @property
    def learning_rate(self) -> float:
        """At its highest."""
        ...

    @property
    def weight_decay(self) -> float:
        """Of AdamW."""
        ...


Trained = TypeVar("Trained", bound=Trainable)


@dataclass(frozen=True)
class ProbeOptions:
    """How a linear probe is trained; what is not given is the preset's.

    Attributes:
        preset: paper is the published protocol (hours on a GPU); quick trains on features of whole images, which are
            taken once (minutes on a CPU).
        seeds: of the probe; each is trained and judged.
        size: quick only; height and width in pixels at which images are shown, or one number for a square. Without
            it, their own, rounded to the patch grid.
        steps: of the optimiser; the warm-up keeps its share.
        batch: images a step.
        learning_rate: at its highest.
        weight_decay: of AdamW.
    """

    preset: Preset = "quick"
    seeds: tuple[int, ...] = (0, 1, 2)
    size: int | tuple[int, int] | None = None
    steps: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None

    def applied(self, base: Trained, shown: str) -> Trained:
        """A protocol with what was changed.

        Args:
            base: of the preset.
            shown: what the published protocol shows, for the message that it has no size.

        Raises:
            PlanError: naming the option, its range, and what came.
        """
        if self.size is not None and self.preset == "paper":
            raise PlanError(f"size is for preset quick; paper shows {shown}")
        self._check()
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

    def _check(self) -> None:
        seeds, rate, decay = self.seeds, self.learning_rate, self.weight_decay
        if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
            raise PlanError(f"seeds must be one number or more, 0 or above and different, got {seeds}")
        for name, value in {"steps": self.steps, "batch": self.batch}.items():
            if value is not None and value < 1:
                raise PlanError(f"{name} must be at least 1, got {value}")
        if rate is not None and not 0 < rate < math.inf:
            raise PlanError(f"learning_rate must be a positive number, got {rate}")
        if decay is not None and not 0 <= decay < math.inf:
            raise PlanError(f"weight_decay must be 0 or more, got {decay}")


def recorded(protocol: Any) -> dict[str, Any]:
    """What results of a protocol, a dataclass, are kept under, as JSON values.

    Settings that came later are left out where they are what was always done, so that earlier results still count.
    """
    always = {"pads": "cut", "together": None}
    return {name: value for name, value in asdict(protocol).items() if name not in always or value != always[name]}


def warmed(rate: float, step: int, warmup: int, start: float) -> float:
    """A rate in a linear warm-up over so many steps, from a share of it; after that as it is."""
    return rate if step >= warmup else rate * (1 - (1 - step / warmup) * (1 - start))
