"""Per-item outcomes of a task, and paired 95 % intervals of the difference between two sources.

The metric over all groups is recomputed without each group in turn. These jackknife values give its standard error, and
Student's t, with one degree of freedom less than the number of groups, gives the interval. If the influence of groups
is skewed, that interval misses on one side too often. Hall's cubic transformation (1992) corrects for skewness, and on
each side the farther of the two ends is used. `benchmarks/coverage.py` measures the coverage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np

from denoising_vit.errors import EvaluationError

#: Training history for results: [step, loss, main metric or None].
Curve = list[list[Any]]

#: Minimum number of groups for an interval.
MIN_GROUPS = 5

#: Name of the interval's method in results.
METHOD = "jackknife t, skewness-corrected"

_CHUNK = 256  # groups per batch: weights are (groups, items)


@dataclass(frozen=True)
class Interval:
    """Difference of the main metric of two sources, with its 95 % interval.

    Attributes:
        difference: difference over all items.
        low: lower end of the interval; None with fewer than MIN_GROUPS groups.
        high: upper end; None with fewer than MIN_GROUPS groups.
        groups: number of groups with a value.
    """

    difference: float
    low: float | None
    high: float | None
    groups: int


def interval_over(
    difference: float, groups: np.ndarray, figure: Callable[[np.ndarray], np.ndarray], there: Sequence[np.ndarray]
) -> Interval:
    """The 95 % interval of a statistic over groups of items.

    Args:
        difference: the statistic over all items.
        groups: (items,) the group of each item.
        figure: returns the statistic (rows,) for weights (rows, items) of the items.
        there: for each outcome in the statistic, (items,) bool: True for items with a value. Groups without any are
            ignored; the outcome with the fewest groups decides whether there are enough.
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
    """Both ends of the 95 % interval of a statistic, from its ``value`` and the statistic (n,) without each group."""
    from scipy.special import stdtrit  # not needed by most commands

    count = len(without)
    influence = (count - 1) * (without.mean() - without)
    spread = influence.std()
    if spread <= 1e-12 * max(1.0, abs(value)):  # rounding error
        return value, value
    error = spread / np.sqrt(count - 1)
    skew = float((influence**3).mean() / spread**3 / np.sqrt(count))
    quantile = float(stdtrit(count - 1, 0.975))
    farthest = [max(quantile, sign * _hall(sign * quantile, skew)) for sign in (1, -1)]
    return float(value - farthest[0] * error), float(value + farthest[1] * error)


def _hall(quantile: float, skew: float) -> float:
    """Quantile of a studentised mean of n terms with skewness skew * sqrt(n)."""
    if abs(skew) < 1e-6:
        return quantile
    return float(3 / skew * (np.cbrt(1 + skew * (quantile - skew / 6)) - 1))


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Part / whole, NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


class Outcome(ABC):
    """Result of a task for each item: an image, a pair of images, an object. Subclasses are dataclasses of arrays.

    Attributes:
        groups: (items,) int64; items with the same number are one group, such as the frames of a video.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    groups: np.ndarray

    @property
    def items(self) -> int:
        """Number of items."""
        return len(self.groups)

    @property
    @abstractmethod
    def there(self) -> np.ndarray:
        """(items,) bool: True for items that count in the main metric."""

    @abstractmethod
    def scored(self) -> dict[str, float]:
        """Metrics over all items, the main one first."""

    @abstractmethod
    def drawn(self, weights: np.ndarray) -> np.ndarray:
        """Main metric (rows,) for weights (rows, items) of the items; NaN if undefined."""

    def classes(self, data: Any) -> dict[str, dict[str, float | None]]:
        """Metrics of each class of the data; empty without classes."""
        return {}

    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays that :meth:`of` restores the outcome from."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Restore an outcome from its arrays; KeyError if one is missing."""
        return cls(**{one.name: arrays[one.name] for one in fields(cls) if one.init})


@dataclass(frozen=True, eq=False)
class Measured(Outcome):
    """Metrics of each item; the task's metrics are their means. Subclasses set ``METRICS``, the main one first.

    Attributes:
        values: (items, metrics) float64; NaN excludes an item from the mean of that metric.
        groups: as in :class:`Outcome`.
    """

    METRICS: ClassVar[tuple[str, ...]] = ()

    values: np.ndarray
    groups: np.ndarray

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.groups), len(self.METRICS)) or not len(self.groups):
            raise EvaluationError(
                f"expected {len(self.METRICS)} metrics ({', '.join(self.METRICS)}) for each of at least one item, got "
                f"{self.values.shape} for {len(self.groups)} items"
            )

    @property
    def there(self) -> np.ndarray:
        """(items,) bool: True for items with the main metric."""
        return ~np.isnan(self.values[:, 0])

    def scored(self) -> dict[str, float]:
        """Means over items; EvaluationError if no item has the main metric."""
        if not self.there.any():
            raise EvaluationError(f"none of {self.items} items has a value of {self.METRICS[0]}")
        there = ~np.isnan(self.values)
        means = ratio(np.where(there, self.values, 0).sum(0), there.sum(0))
        return dict(zip(self.METRICS, means.tolist(), strict=True))

    def drawn(self, weights: np.ndarray) -> np.ndarray:
        """Weighted mean of the main metric (rows,) for weights (rows, items)."""
        main, there = self.values[:, 0], self.there
        return ratio(weights[:, there] @ main[there], weights[:, there].sum(1))


def paired_interval(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> Interval:
    """Paired 95 % interval of the difference in the main metric: both sources leave out the same group.

    Args:
        ours: outcomes of one source, one per seed; differences are averaged over seeds.
        theirs: outcomes of the other source for the same seeds.

    Raises:
        EvaluationError: if items, seeds or groups differ between the sources.
    """
    pairs = list(zip(ours, theirs, strict=False))
    if not ours or len(ours) != len(theirs) or any(a.items != b.items for a, b in pairs):
        raise EvaluationError("a paired interval needs the same items and seeds for both sources")
    groups = ours[0].groups
    if any(not np.array_equal(a.groups, groups) for a in (*ours, *theirs)):
        raise EvaluationError("a paired interval needs the same groups of items for both sources")
    difference = float(np.mean([_main(a) - _main(b) for a, b in pairs]))

    def figure(weights: np.ndarray) -> np.ndarray:
        return np.mean([a.drawn(weights) - b.drawn(weights) for a, b in pairs], axis=0)

    return interval_over(difference, groups, figure, [one.there for one in (*ours, *theirs)])


def _main(outcome: Outcome) -> float:
    return next(iter(outcome.scored().values()))


def record_of(interval: Interval, metric: str, against: str, reference: str, over: str) -> dict[str, Any]:
    """The difference as JSON values for a line of results."""
    names = {"against": against, "reference": reference, "metric": metric}
    return names | asdict(interval) | {"over": over, "method": METHOD}
