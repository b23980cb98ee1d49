"""Metrics of each item: means, weighted means, and intervals of differences, against loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest
from scipy import stats

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation import outcomes
from denoising_vit.evaluation.outcomes import METHOD, Interval, Measured, paired_interval, record_of
from denoising_vit.evaluation.results import METRICS
from denoising_vit.evaluation.scores import Counts


class Two(Measured):
    """An outcome with two metrics."""

    METRICS: ClassVar[tuple[str, ...]] = ("main", "other")


NAN = float("nan")


def two(main: Sequence[float], groups: Sequence[int] | None = None, other: Sequence[float] | None = None) -> Two:
    values = np.array([main, other or [0.0] * len(main)], dtype=float).T
    return Two(values, np.arange(len(main)) if groups is None else np.array(groups))


def random_two(seed: int, groups: Sequence[int], gaps: bool = True) -> Two:
    chance = np.random.default_rng(seed)
    main = chance.normal(5, 2, len(groups))
    if gaps:
        main[chance.random(len(groups)) < 0.2] = NAN
    return two(main.tolist(), groups)


# --- Measured


@pytest.mark.parametrize("shape", [(3, 1), (3, 3), (2, 2), (6,), (0, 2)])
def test_values_of_another_shape_are_rejected(shape: tuple[int, ...]) -> None:
    items = 0 if shape[0] == 0 else 3
    with pytest.raises(EvaluationError, match=r"expected 2 metrics \(main, other\) for each of at least one item, got"):
        Two(np.zeros(shape), np.arange(items))


def test_metrics_are_means_over_items_that_have_them() -> None:
    found = two([1, NAN, 4], other=[NAN, 5, NAN])
    assert found.items == 3
    assert found.scored() == {"main": 2.5, "other": 5.0}
    assert list(found.scored()) == ["main", "other"]
    assert found.classes(None) == {}  # type: ignore[arg-type]


def test_metric_without_values_is_nan_or_an_error_if_it_is_the_main_one() -> None:
    assert math.isnan(two([1, 2], other=[NAN, NAN]).scored()["other"])
    with pytest.raises(EvaluationError, match="none of 2 items has a value of main"):
        two([NAN, NAN], other=[1, 2]).scored()


def test_drawn_metrics_are_means_of_the_drawn_items() -> None:
    found = random_two(0, range(9))
    weights = np.random.default_rng(1).integers(0, 4, (50, 9))
    for value, counts in zip(found.drawn(weights), weights, strict=True):
        taken = [main for main, times in zip(found.values[:, 0], counts, strict=True) for _ in range(times)]
        assert value == pytest.approx(np.mean([main for main in taken if not math.isnan(main)]))
    assert np.isnan(found.values[:, 0]).any()


def test_draw_without_any_value_is_nan() -> None:
    found = two([1, NAN, 4])
    assert np.isnan(found.drawn(np.array([[0, 3, 0], [0, 0, 0]]))).all()
    assert found.drawn(np.array([[0, 2, 1]])).tolist() == [4.0]


def test_arrays_round_trip() -> None:
    found = random_two(3, [0, 0, 1, 2])
    again = Two.of(found.arrays())
    assert np.array_equal(again.values, found.values, equal_nan=True)
    assert again.groups.tolist() == [0, 0, 1, 2]
    with pytest.raises(KeyError):
        Two.of({"values": found.values})


def test_depth_metrics_have_the_right_order_direction_and_digits() -> None:
    assert [metric.name for metric in METRICS["depth"]] == ["RMSE", "AbsRel", "log10", "a1", "a2", "a3"]
    assert [metric.lower for metric in METRICS["depth"]] == [True, True, True, False, False, False]
    assert [metric.digits for metric in METRICS["depth"]] == [4, 4, 4, 2, 2, 2]


# --- Intervals


def width(found: Interval) -> float:
    assert found.low is not None and found.high is not None
    return found.high - found.low


def by_hand(ours: Sequence[Two], theirs: Sequence[Two]) -> tuple[float, float, float]:
    """Difference and its t interval, from leaving out each group in turn."""
    names = sorted(set(ours[0].groups.tolist()))

    def difference(left_out: int | None) -> float:
        each = []
        for a, b in zip(ours, theirs, strict=True):
            means = [float(np.nanmean(one.values[one.groups != left_out, 0])) for one in (a, b)]
            each.append(means[0] - means[1])
        return float(np.mean(each))

    without = np.array([difference(name) for name in names])
    n = len(names)
    error = math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
    found = difference(None)
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    return found, found - reach, found + reach


@pytest.mark.parametrize(
    "groups", [[0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4], [7, 7, -2, -2, 40, 7, 40, 5, 5, 5, 9, 8], list(range(10))]
)
def test_intervals_are_t_intervals_over_groups_or_wider_on_one_side(groups: list[int]) -> None:
    ours, theirs = ([random_two(10 * side + seed, groups, gaps=False) for seed in range(2)] for side in (1, 2))
    found, (difference, low, high) = paired_interval(ours, theirs), by_hand(ours, theirs)
    assert found.difference == pytest.approx(difference) and found.groups == len(set(groups))
    assert found.low is not None and found.high is not None
    assert found.low <= low + 1e-9 and found.high >= high - 1e-9
    assert found.low == pytest.approx(low) or found.high == pytest.approx(high)
    assert width(found) < 4 * (high - low)  # with five groups, a single one can dominate


def test_an_interval_of_five_means_by_hand() -> None:
    """Differences -2 to 2: standard deviation sqrt(2.5), t with 4 degrees of freedom 2.776, no skewness."""
    found = paired_interval([two([-2, -1, 0, 1, 2])], [two([0.0] * 5)])
    assert (found.difference, found.low, found.high) == pytest.approx((0, -1.963, 1.963), abs=1e-3)


def test_skewed_differences_widen_the_interval_towards_the_long_tail() -> None:
    found = paired_interval([two([0.1, 0, 0.2, 0, 0.1, 0, 0, 0.1, 0, 5])], [two([0.0] * 10)])
    _, low, high = by_hand([two([0.1, 0, 0.2, 0, 0.1, 0, 0, 0.1, 0, 5])], [two([0.0] * 10)])
    assert found.low == pytest.approx(low) and found.high is not None and found.high > high + 0.5


@pytest.mark.parametrize(("groups", "skewed", "least"), [(5, False, 0.93), (10, False, 0.93), (10, True, 0.925)])
def test_about_95_percent_of_intervals_contain_the_truth(groups: int, *, skewed: bool, least: float) -> None:
    """Percentile intervals of a bootstrap contain it in 84, 89 and 85 % of the cases."""
    chance, held = np.random.default_rng(0), 0
    for _ in range(1000):
        values = chance.exponential(1, groups) - 1 if skewed else chance.normal(0, 1, groups)
        found = paired_interval([two(values.tolist())], [two([0.0] * groups)])
        assert found.low is not None and found.high is not None
        held += found.low <= 0 <= found.high
    assert least <= held / 1000 <= 0.98


def test_with_fewer_than_five_groups_there_is_no_interval() -> None:
    four = two(list(range(12)), [number % 4 for number in range(12)])
    assert paired_interval([four], [four]) == Interval(0.0, None, None, 4)
    gaps = two([1.0, 2, 3, 4, NAN, NAN])  # two groups have no value
    assert paired_interval([gaps], [gaps]).groups == 4


def test_group_names_do_not_matter() -> None:
    ours, theirs = random_two(1, range(12), gaps=False), random_two(2, range(12), gaps=False)
    named = [Two(one.values, np.arange(12)[::-1] * 3) for one in (ours, theirs)]
    found, other = paired_interval([ours], [theirs]), paired_interval(named[:1], named[1:])
    assert (found.low, found.high) == pytest.approx((other.low, other.high))


def test_chunk_size_does_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = random_two(1, range(40)), random_two(2, range(40))
    found = paired_interval([ours], [theirs])
    monkeypatch.setattr(outcomes, "_CHUNK", 7)
    again = paired_interval([ours], [theirs])
    assert (again.low, again.high) == pytest.approx((found.low, found.high))


def test_counts_of_classes_leave_out_one_image_at_a_time() -> None:
    chance = np.random.default_rng(0)

    def counts() -> Counts:
        hits = chance.integers(0, 50, (7, 3))
        return Counts(hits, hits + chance.integers(1, 30, hits.shape), hits + chance.integers(1, 30, hits.shape))

    def miou(one: Counts, image: int | None) -> float:
        hits, truth, predicted = (
            np.delete(values, [] if image is None else image, 0).sum(0)
            for values in (one.hits, one.truth, one.predicted)
        )
        return float(100 * np.mean(hits / (truth + predicted - hits)))

    ours, theirs = counts(), counts()
    without = np.array([miou(ours, image) - miou(theirs, image) for image in range(7)])
    difference = miou(ours, None) - miou(theirs, None)
    found = paired_interval([ours], [theirs])
    assert (found.low, found.high) == pytest.approx(outcomes.ends(difference, without))
    assert found.difference == pytest.approx(difference)


def test_grouped_items_make_an_interval_wider() -> None:
    groups = [number // 5 for number in range(30)]
    shared = np.random.default_rng(0).normal(0, 1, 6)[groups]
    ours, zeros = two(shared.tolist(), groups), two([0.0] * 30, groups)
    together = paired_interval([ours], [zeros])
    alone = paired_interval([two(shared.tolist())], [two([0.0] * 30)])
    assert width(together) > 1.5 * width(alone)
    assert together.difference == alone.difference


def test_identical_sides_have_a_zero_interval() -> None:
    one = random_two(1, [0, 0, 1, 1, 2, 3, 4], gaps=False)
    assert paired_interval([one], [one]) == Interval(0, 0, 0, 5)


def test_constant_difference_has_an_interval_of_zero_width() -> None:
    one = random_two(1, [0, 0, 1, 1, 2, 3, 4], gaps=False)
    found = paired_interval([Two(one.values + 0.5, one.groups)], [one])
    assert (found.difference, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_items_without_a_value_do_not_change_the_interval() -> None:
    main = np.random.default_rng(0).normal(0, 1, 20).tolist()
    plain = paired_interval([two(main)], [two([0.0] * 20)])
    gaps = paired_interval([two([*main, *[NAN] * 20])], [two([0.0] * 20 + [NAN] * 20)])
    assert (gaps.difference, gaps.low, gaps.high) == pytest.approx((plain.difference, plain.low, plain.high))
    assert gaps.groups == 20


def test_side_with_fewer_groups_decides_whether_there_are_enough() -> None:
    full, thin = two([1.0, 2, 3, 4, 5, 6]), two([1.0, NAN, NAN, NAN, NAN, NAN])
    assert paired_interval([full], [thin]) == Interval(2.5, None, None, 1)


def test_other_items_or_seeds_cannot_be_paired() -> None:
    three, four = two([1, 2, 3]), two([1, 2, 3, 4])
    for left, right in (([], []), ([three], [four]), ([three], [three, three]), ([three, three], [three, four])):
        with pytest.raises(EvaluationError, match="a paired interval needs the same items and seeds for both sources"):
            paired_interval(left, right)


def test_record_of_a_difference() -> None:
    assert record_of(Interval(-0.5, -0.75, -0.25, 7), "RMSE", "raw", "abc", "blocks") == {
        "against": "raw",
        "reference": "abc",
        "metric": "RMSE",
        "difference": -0.5,
        "low": -0.75,
        "high": -0.25,
        "groups": 7,
        "over": "blocks",
        "method": METHOD,
    }


def test_differently_grouped_items_cannot_be_paired() -> None:
    values = np.zeros((4, 2))
    ours, theirs = Two(values, np.array([0, 0, 1, 1])), Two(values, np.array([0, 1, 1, 1]))
    with pytest.raises(EvaluationError, match="the same groups of items for both sources"):
        paired_interval([ours], [theirs])
