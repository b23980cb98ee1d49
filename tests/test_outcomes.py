"""Figures item by item: means, draws of groups, and intervals of differences, against loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.metrics import METRICS
from denoising_vit.evaluation.outcomes import DRAWS, Interval, Measured, paired_interval, record_of
from denoising_vit.evaluation.scores import Counts


class Two(Measured):
    """Two figures."""

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
def test_figures_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    items = 0 if shape[0] == 0 else 3
    with pytest.raises(EvaluationError, match=r"expected 2 figures \(main, other\) of each of at least one item, got"):
        Two(np.zeros(shape), np.arange(items))


def test_metrics_are_means_over_items_that_have_them() -> None:
    found = two([1, NAN, 4], other=[NAN, 5, NAN])
    assert found.items == 3
    assert found.scored() == {"main": 2.5, "other": 5.0}
    assert list(found.scored()) == ["main", "other"]
    assert found.classes(None) == {}  # type: ignore[arg-type]


def test_a_figure_that_no_item_has_is_none_unless_it_is_the_main_one() -> None:
    assert math.isnan(two([1, 2], other=[NAN, NAN]).scored()["other"])
    with pytest.raises(EvaluationError, match="none of 2 items has a figure of main: nothing to score"):
        two([NAN, NAN], other=[1, 2]).scored()


def test_draws_are_means_of_what_was_drawn() -> None:
    found = random_two(0, range(9))
    weights = np.random.default_rng(1).integers(0, 4, (50, 9))
    for value, counts in zip(found.drawn(weights), weights, strict=True):
        taken = [main for main, times in zip(found.values[:, 0], counts, strict=True) for _ in range(times)]
        assert value == pytest.approx(np.mean([main for main in taken if not math.isnan(main)]))
    assert np.isnan(found.values[:, 0]).any()


def test_a_draw_of_nothing_that_has_the_figure_is_none() -> None:
    found = two([1, NAN, 4])
    assert np.isnan(found.drawn(np.array([[0, 3, 0], [0, 0, 0]]))).all()
    assert found.drawn(np.array([[0, 2, 1]])).tolist() == [4.0]


def test_arrays_give_the_same_back() -> None:
    found = random_two(3, [0, 0, 1, 2])
    again = Two.of(found.arrays())
    assert np.array_equal(again.values, found.values, equal_nan=True)
    assert again.groups.tolist() == [0, 0, 1, 2]
    with pytest.raises(KeyError):
        Two.of({"values": found.values})


def test_every_main_metric_is_the_first_of_its_task() -> None:
    assert [metric.name for metric in METRICS["depth"]] == ["RMSE", "AbsRel", "log10", "a1", "a2", "a3"]
    assert [metric.lower for metric in METRICS["depth"]] == [True, True, True, False, False, False]
    assert [metric.digits for metric in METRICS["depth"]] == [4, 4, 4, 2, 2, 2]


# --- Intervals


def by_hand(ours: Sequence[Two], theirs: Sequence[Two], draws: int = DRAWS) -> Interval:
    """Each draw takes as many groups as there are, and of each all its items as often as it was drawn."""
    names = sorted(set(ours[0].groups.tolist()))
    chance = np.random.default_rng(0)
    found = []
    for counts in chance.multinomial(len(names), [1 / len(names)] * len(names), size=draws).tolist():
        drawn = [name for name, times in zip(names, counts, strict=True) for _ in range(times)]
        differences = []
        for a, b in zip(ours, theirs, strict=True):
            means = []
            for one in (a, b):
                taken = [one.values[one.groups == name, 0] for name in drawn]
                values = np.concatenate(taken)
                values = values[~np.isnan(values)]
                means.append(values.mean() if values.size else NAN)
            differences.append(means[0] - means[1])
        found.append(float(np.mean(differences)))
    known = [value for value in found if not math.isnan(value)]
    low, high = np.percentile(known, [2.5, 97.5])
    difference = np.mean(
        [np.nanmean(a.values[:, 0]) - np.nanmean(b.values[:, 0]) for a, b in zip(ours, theirs, strict=True)]
    )
    return Interval(float(difference), float(low), float(high))


def near(found: Interval, wanted: Interval) -> bool:
    return (found.difference, found.low, found.high) == pytest.approx((wanted.difference, wanted.low, wanted.high))


@pytest.mark.parametrize(
    "groups", [[0, 0, 0, 1, 1, 2, 2, 2, 2, 3], [7, 7, -2, -2, 40, 7, 40, 5, 5, 5], list(range(10))]
)
def test_intervals_are_those_of_a_bootstrap_over_groups(groups: list[int]) -> None:
    ours, theirs = ([random_two(10 * side + seed, groups) for seed in range(2)] for side in (1, 2))
    assert near(paired_interval(ours, theirs), by_hand(ours, theirs))
    few = paired_interval(ours, theirs, draws=50)
    assert near(few, by_hand(ours, theirs, 50)) and few.low != paired_interval(ours, theirs).low


def test_where_items_are_their_own_groups_intervals_are_over_items() -> None:
    """As it was before there were groups: items are drawn with replacement, one by one."""
    ours, theirs = random_two(1, range(12), gaps=False), random_two(2, range(12), gaps=False)
    weights = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), size=DRAWS)
    differences = weights @ (ours.values[:, 0] - theirs.values[:, 0]) / 12
    found = paired_interval([ours], [theirs])
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])))
    named = [Two(one.values, np.arange(12)[::-1] * 3) for one in (ours, theirs)]
    assert paired_interval(named[:1], named[1:]).difference == found.difference


def test_counts_of_classes_are_drawn_image_by_image() -> None:
    chance = np.random.default_rng(0)

    def counts() -> Counts:
        hits = chance.integers(0, 50, (7, 3))
        return Counts(hits, hits + chance.integers(1, 30, hits.shape), hits + chance.integers(1, 30, hits.shape))

    def miou(one: Counts, times: np.ndarray) -> float:
        hits, truth, predicted = (times @ values for values in (one.hits, one.truth, one.predicted))
        return float(100 * np.mean(hits / (truth + predicted - hits)))

    ours, theirs = counts(), counts()
    weights = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), size=DRAWS)
    differences = [miou(ours, times) - miou(theirs, times) for times in weights]
    found = paired_interval([ours], [theirs])
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])))
    assert found.difference == pytest.approx(miou(ours, np.ones(7)) - miou(theirs, np.ones(7)))


def test_items_that_belong_together_make_an_interval_wider() -> None:
    groups = [number // 5 for number in range(30)]
    shared = np.random.default_rng(0).normal(0, 1, 6)[groups]
    ours, zeros = two(shared.tolist(), groups), two([0.0] * 30, groups)
    together = paired_interval([ours], [zeros])
    alone = paired_interval([two(shared.tolist())], [two([0.0] * 30)])
    assert together.high - together.low > 1.5 * (alone.high - alone.low)
    assert together.difference == alone.difference


def test_the_same_on_both_sides_differs_by_nothing() -> None:
    one = random_two(1, [0, 0, 1, 1, 2])
    assert paired_interval([one], [one]) == Interval(0, 0, 0)


def test_a_constant_difference_is_sure() -> None:
    one = random_two(1, [0, 0, 1, 1, 2], gaps=False)
    found = paired_interval([Two(one.values + 0.5, one.groups)], [one])
    assert (found.difference, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_items_without_a_figure_do_not_widen_an_interval() -> None:
    """They are drawn, and then are not there."""
    main = np.random.default_rng(0).normal(0, 1, 20).tolist()
    plain = paired_interval([two(main)], [two([0.0] * 20)])
    gaps = paired_interval([two([*main, *[NAN] * 20])], [two([0.0] * 20 + [NAN] * 20)])
    assert gaps.difference == pytest.approx(plain.difference)
    assert (gaps.high - gaps.low) == pytest.approx(plain.high - plain.low, rel=0.2)


def test_other_items_or_seeds_cannot_be_paired() -> None:
    three, four = two([1, 2, 3]), two([1, 2, 3, 4])
    for left, right in (([], []), ([three], [four]), ([three], [three, three]), ([three, three], [three, four])):
        with pytest.raises(EvaluationError, match="a paired interval needs the same items and seeds on both sides"):
            paired_interval(left, right)


def test_the_record_of_a_difference_tells_what_was_drawn() -> None:
    assert record_of(Interval(-0.5, -0.75, -0.25), "RMSE", "raw", "abc", "blocks") == {
        "against": "raw",
        "reference": "abc",
        "metric": "RMSE",
        "difference": -0.5,
        "low": -0.75,
        "high": -0.25,
        "over": "blocks",
        "draws": 1000,
    }


def test_items_that_are_grouped_otherwise_cannot_be_paired() -> None:
    values = np.zeros((4, 2))
    ours, theirs = Two(values, np.array([0, 0, 1, 1])), Two(values, np.array([0, 1, 1, 1]))
    with pytest.raises(EvaluationError, match="the same groups of items on both sides"):
        paired_interval([ours], [theirs])
