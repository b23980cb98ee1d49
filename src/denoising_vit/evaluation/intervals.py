"""95 % intervals from few groups, whose coverage `benchmarks/coverage.py` measures.

A figure over all groups (a mean, or a ratio of sums such as mIoU) is computed again without each group in turn. These
jackknife values give its standard error, and Student's t with one degree of freedom less than there are groups gives
the interval. Where the groups' influences are skewed, that interval misses on one side too often: Hall's cubic
transformation (1992) corrects it for the skewness, and the farther of the two ends is taken on each side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

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
