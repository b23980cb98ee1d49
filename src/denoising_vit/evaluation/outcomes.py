"""Per-item outcomes of a task, and paired 95 % intervals of the difference between two sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import JudgedData

#: With fewer groups there is no interval.
MIN_GROUPS = 5


#: What results say of how an interval was made.
METHOD = "jackknife t, skewness-corrected"


_CHUNK = 256  # groups at once: weights are (groups, items)


@dataclass(frozen=True)
class Interval:
    """The difference of two sources' main metric, and where it may lie.

    Attributes:
        difference: of the scores of all items.
        low: lower end of the 95 % interval; None with fewer than MIN_GROUPS groups.
        high: upper end of it; None likewise.
        groups: how many groups of items have a figure.
    """

    difference: float
    low: float | None
    high: float | None
    groups: int


def interval_over(
    difference: float, groups: np.ndarray, figure: Callable[[np.ndarray], np.ndarray], there: Sequence[np.ndarray]
) -> Interval:
    """The 95 % interval of a figure over groups of items.

    Args:
        difference: the figure over all items.
        groups: (items,) the group of each item.
        figure: the figure (rows,) where items count as often as weights (rows, items) say.
        there: (items,) each, of all outcomes that the figure is taken of: whether an item has a figure in it. Groups
            that have none in any are left out; the outcome with the fewest decides whether there are enough.
    """
    names = np.unique(groups[np.any(there, axis=0)])
    fewest = min(len(np.unique(groups[one])) for one in there)
    if fewest < MIN_GROUPS:
        return Interval(difference, None, None, fewest)
    parts = [names[start : start + _CHUNK, None] for start in range(0, len(names), _CHUNK)]
    without = np.concatenate([figure((groups != part).astype(float)) for part in parts])
    low, high = ends(difference, without)
    return Interval(difference, low, high, fewest)


def ends(value: float, without: np.ndarray) -> tuple[float, float]:
    """Both ends of the 95 % interval of a figure.

    Args:
        value: the figure over all n groups.
        without: (n,) the figure over all groups but one, each in turn.
    """
    from scipy.special import stdtrit  # as quick as the table, and not needed by most commands

    count = len(without)
    influence = (count - 1) * (without.mean() - without)
    spread = influence.std()
    if spread <= 1e-12 * max(1.0, abs(value)):  # rounding alone
        return value, value
    error = spread / np.sqrt(count - 1)
    skew = float((influence**3).mean() / spread**3 / np.sqrt(count))
    quantile = float(stdtrit(count - 1, 0.975))
    farthest = [max(quantile, sign * _hall(sign * quantile, skew)) for sign in (1, -1)]
    return float(value - farthest[0] * error), float(value + farthest[1] * error)


def _hall(quantile: float, skew: float) -> float:
    """The quantile of a studentised mean whose terms have the skewness skew * sqrt(n)."""
    if abs(skew) < 1e-6:
        return quantile
    return float(3 / skew * (np.cbrt(1 + skew * (quantile - skew / 6)) - 1))


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
