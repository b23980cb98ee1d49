"""What a task found, item by item, so that differences of two sources can be judged over items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.intervals import METHOD, Interval, interval_over
from denoising_vit.evaluation.judged import JudgedData


class Outcome(Protocol):
    """What was found of each judged item: an image, a pair of images, an object."""

    @property
    def items(self) -> int:
        """How many."""
        ...

    @property
    def groups(self) -> np.ndarray:
        """(items,) int64: items of one number belong together, and are left out together (frames of one video)."""
        ...

    @property
    def there(self) -> np.ndarray:
        """(items,) bool: whether an item has anything that the main metric counts."""
        ...

    def scored(self) -> dict[str, float]:
        """The task's metrics over all items, the main one first."""
        ...

    def drawn(self, weights: np.ndarray) -> np.ndarray:
        """The main metric (rows,) where items count as often as weights (rows, items) say; NaN where it is none."""
        ...

    def classes(self, data: JudgedData) -> dict[str, dict[str, float | None]]:
        """Metrics of each class, where there are classes."""
        ...

    def arrays(self) -> dict[str, np.ndarray]:
        """What :meth:`of` takes."""
        ...

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Back from arrays.

        Raises:
            KeyError: if one is missing.
        """
        ...


@dataclass(frozen=True, eq=False)
class Measured:
    """Figures of each item; metrics are their means.

    Subclasses name the figures, the main one first.

    Attributes:
        values: (items, figures) float64; NaN where an item has no such figure, which leaves it out of that mean.
        groups: (items,) int64; items of one number are left out together where an interval is taken.
    """

    METRICS: ClassVar[tuple[str, ...]] = ()

    values: np.ndarray
    groups: np.ndarray

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.groups), len(self.METRICS)) or not len(self.groups):
            raise EvaluationError(
                f"expected {len(self.METRICS)} figures ({', '.join(self.METRICS)}) of each of at least one item, got "
                f"{self.values.shape} for {len(self.groups)} items"
            )

    @property
    def items(self) -> int:
        """How many."""
        return len(self.values)

    @property
    def there(self) -> np.ndarray:
        """(items,) bool: whether an item has the main figure."""
        return ~np.isnan(self.values[:, 0])

    def scored(self) -> dict[str, float]:
        """Means over items.

        Raises:
            EvaluationError: if no item has the main figure.
        """
        if not self.there.any():
            raise EvaluationError(f"none of {self.items} items has a figure of {self.METRICS[0]}: nothing to score")
        there = ~np.isnan(self.values)
        sums = np.where(there, self.values, 0).sum(0)
        means = np.divide(sums, there.sum(0), out=np.full(len(self.METRICS), np.nan), where=there.any(0))
        return dict(zip(self.METRICS, means.tolist(), strict=True))

    def drawn(self, weights: np.ndarray) -> np.ndarray:
        """The main figure's mean (rows,) under weights (rows, items)."""
        main, there = self.values[:, 0], self.there
        counts = weights[:, there].sum(1)
        sums = weights[:, there] @ main[there]
        return np.divide(sums, counts, out=np.full(len(weights), np.nan), where=counts > 0)

    def classes(self, data: JudgedData) -> dict[str, dict[str, float | None]]:
        """None: items have no classes."""
        return {}

    def arrays(self) -> dict[str, np.ndarray]:
        """Both arrays."""
        return {"values": self.values, "groups": self.groups}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Back from arrays."""
        return cls(arrays["values"], arrays["groups"])


def paired_interval(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> Interval:
    """95 % interval of the difference of the main metric over groups of items, paired: both lose the same group.

    Args:
        ours: of one source, for each seed of the probe; differences are averaged over seeds.
        theirs: of the other, for the same seeds.

    Raises:
        EvaluationError: if there are not as many items or seeds on both sides, or items are grouped otherwise.
    """
    pairs = list(zip(ours, theirs, strict=False))
    if not ours or len(ours) != len(theirs) or any(a.items != b.items for a, b in pairs):
        raise EvaluationError("a paired interval needs the same items and seeds on both sides")
    groups = ours[0].groups
    if any(not np.array_equal(a.groups, groups) for a in (*ours, *theirs)):
        raise EvaluationError("a paired interval needs the same groups of items on both sides")
    difference = float(np.mean([_main(a) - _main(b) for a, b in pairs]))

    def figure(weights: np.ndarray) -> np.ndarray:
        return np.mean([a.drawn(weights) - b.drawn(weights) for a, b in pairs], axis=0)

    return interval_over(difference, groups, figure, [one.there for one in (*ours, *theirs)])


def _main(outcome: Outcome) -> float:
    return next(iter(outcome.scored().values()))


def record_of(interval: Interval, metric: str, against: str, reference: str, over: str) -> dict[str, Any]:
    """What a line of results tells of a difference, as JSON values."""
    told = {"against": against, "reference": reference, "metric": metric}
    return told | asdict(interval) | {"over": over, "method": METHOD}
