"""Scores against the straightforward computation, and intervals of differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import JaccardIndex

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.masks import NO_LABEL
from denoising_vit.evaluation.outcomes import Interval, paired_interval
from denoising_vit.evaluation.scores import Counts, count, scores

CLASSES = 7


def straightforward(pairs: list[tuple[Tensor, Tensor]], classes: int) -> tuple[float, float, float]:
    """MIoU, mAcc and aAcc in percent from a confusion matrix that is filled pixel by pixel."""
    confusion = [[0] * classes for _ in range(classes)]  # [truth][predicted]
    for predicted, truth in pairs:
        for p, t in zip(predicted.flatten().tolist(), truth.flatten().tolist(), strict=True):
            if t != NO_LABEL:
                confusion[t][p] += 1
    ious, accs = [], []
    for k in range(classes):
        hits, true = confusion[k][k], sum(confusion[k])
        claimed = sum(confusion[t][k] for t in range(classes))
        if true + claimed:
            ious.append(hits / (true + claimed - hits))
        if true:
            accs.append(hits / true)
    hits, total = sum(confusion[k][k] for k in range(classes)), sum(map(sum, confusion))
    return 100 * sum(ious) / len(ious), 100 * sum(accs) / len(accs), 100 * hits / total


def random_pairs(
    images: int = 5, seed: int = 0, right: float = 0.6, true: tuple[int, ...] = tuple(range(CLASSES))
) -> list[tuple[Tensor, Tensor]]:
    """Predictions and truths of images of different sizes; every class is predicted, a fifth of pixels has no label."""
    chance = np.random.default_rng(seed)
    pairs = []
    for number in range(images):
        shape = 11 + number, 13
        truth = chance.choice(true, shape)
        predicted = np.where(chance.random(shape) < right, truth, chance.integers(0, CLASSES, shape))
        truth[chance.random(shape) < 0.2] = NO_LABEL
        pairs.append((torch.from_numpy(predicted), torch.from_numpy(truth)))
    return pairs


def counted(pairs: list[tuple[Tensor, Tensor]], classes: int = CLASSES) -> Counts:
    return Counts.joined([count(predicted, truth, classes) for predicted, truth in pairs])


def image_of(hits: list[int], truth: list[int], predicted: list[int]) -> Counts:
    return Counts(*(np.array([values], dtype=np.int64) for values in (hits, truth, predicted)))


# --- scores ---


@pytest.mark.parametrize("seed", range(5))
def test_scores_match_the_straightforward_computation(seed: int) -> None:
    pairs = random_pairs(seed=seed, right=0.2 * seed)
    found = scores(counted(pairs))
    assert (found.miou, found.macc, found.aacc) == pytest.approx(straightforward(pairs, CLASSES), abs=1e-9)


def test_scores_with_classes_missing_in_truth_or_predictions() -> None:
    """Of ten classes, 0, 2 and 5 occur in the truth, 0 to 6 in the predictions, 7 to 9 in neither."""
    pairs = random_pairs(true=(0, 2, 5))
    found = scores(counted(pairs, 10))
    assert (found.miou, found.macc, found.aacc) == pytest.approx(straightforward(pairs, 10), abs=1e-9)
    assert [k for k, value in enumerate(found.iou) if value is None] == [7, 8, 9]
    assert [k for k, value in enumerate(found.iou) if value == 0] == [1, 3, 4, 6]
    assert [k for k, value in enumerate(found.acc) if value is not None] == [0, 2, 5]


def test_two_classes_by_hand() -> None:
    """Class 0: 3 pixels, 2 found, 1 claimed wrongly; class 1: 2 pixels, 1 found, 1 claimed wrongly; one unlabelled."""
    truth = torch.tensor([[0, 0, 0], [1, 1, NO_LABEL]])
    predicted = torch.tensor([[0, 0, 1], [1, 0, 1]])
    counts = count(predicted, truth, 2)
    assert [values.tolist() for values in (counts.hits, counts.truth, counts.predicted)] == [
        [[2, 1]],
        [[3, 2]],
        [[3, 2]],
    ]
    found = scores(counts)
    assert found.iou == pytest.approx((50.0, 100 / 3))
    assert found.acc == pytest.approx((200 / 3, 50.0))
    assert (found.miou, found.macc, found.aacc) == pytest.approx((125 / 3, 175 / 3, 60.0))


def test_class_that_is_only_predicted_lowers_miou_but_not_macc() -> None:
    truth = torch.tensor([0, 0, 0, 0])
    found = scores(count(torch.tensor([0, 0, 0, 1]), truth, 3))
    assert found.iou == (75.0, 0.0, None)
    assert found.acc == (75.0, None, None)
    assert (found.miou, found.macc, found.aacc) == (37.5, 75.0, 75.0)


def test_miou_matches_torchmetrics_if_every_class_is_present() -> None:
    pairs = random_pairs(seed=9)
    metric = JaccardIndex(task="multiclass", num_classes=CLASSES, average="macro", ignore_index=NO_LABEL)
    for predicted, truth in pairs:
        metric.update(predicted.flatten(), truth.flatten())
    assert scores(counted(pairs)).miou == pytest.approx(100 * float(metric.compute()), abs=1e-4)


def test_predictions_at_unlabelled_pixels_have_no_effect() -> None:
    (predicted, truth), *_ = random_pairs(1)
    other = torch.where(truth == NO_LABEL, (predicted + 3) % CLASSES, predicted)
    assert not torch.equal(other, predicted)
    for ours, theirs in zip(
        vars(count(predicted, truth, CLASSES)).values(), vars(count(other, truth, CLASSES)).values(), strict=True
    ):
        assert np.array_equal(ours, theirs)


def test_perfect_predictions_score_100_and_wrong_ones_0() -> None:
    truth = torch.arange(12).remainder(3)
    right, wrong = scores(count(truth, truth, 3)), scores(count((truth + 1) % 3, truth, 3))
    assert (right.miou, right.macc, right.aacc) == (100.0, 100.0, 100.0)
    assert (wrong.miou, wrong.macc, wrong.aacc) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("classes", [1, 2])
def test_single_class_is_refused(classes: int) -> None:
    """The masks hold only 0 and 255, even if two classes are listed: any guess would score 100."""
    found = count(torch.zeros(4, dtype=torch.int64), torch.tensor([0, 0, 0, NO_LABEL]), classes)
    with pytest.raises(
        EvaluationError, match=rf"only one of {classes} classes occurs in masks or predictions; expected at least 2"
    ):
        scores(found)


def test_single_true_class_with_wrong_predictions_is_scored() -> None:
    found = scores(count(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 0, NO_LABEL]), 2))
    assert found.miou == pytest.approx(100 * (2 / 3 + 0) / 2)


def test_an_image_without_any_label_adds_nothing() -> None:
    pairs = random_pairs()
    with_empty = Counts.joined([counted(pairs), Counts.nothing(CLASSES)])
    assert with_empty.items == 6
    assert scores(with_empty) == scores(counted(pairs))
    predicted, truth = pairs[0]
    assert not count(predicted, torch.full_like(truth, NO_LABEL), CLASSES).predicted.any()


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(EvaluationError, match="no pixel of the evaluated images has a label"):
        scores(count(torch.tensor([0, 1]), torch.tensor([NO_LABEL, NO_LABEL]), 2))
    with pytest.raises(EvaluationError, match="no predictions to score"):
        Counts.joined([])


@pytest.mark.parametrize(("predicted", "truth"), [((2, 3), (3, 2)), ((4,), (5,)), ((0,), (0,)), ((6,), (2, 3))])
def test_a_prediction_for_each_label_is_required(predicted: tuple[int, ...], truth: tuple[int, ...]) -> None:
    with pytest.raises(EvaluationError, match="expected a prediction for each label, got"):
        count(torch.zeros(predicted, dtype=torch.int64), torch.zeros(truth, dtype=torch.int64), 2)


# --- intervals ---


def ends_of(found: Interval) -> tuple[float, float]:
    assert found.low is not None and found.high is not None
    return found.low, found.high


def test_identical_predictions_differ_by_exactly_zero() -> None:
    ours = counted(random_pairs(20))
    found = paired_interval([ours, ours], [ours, ours])
    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)


def test_interval_of_a_better_source_is_above_zero() -> None:
    better, worse = counted(random_pairs(20, right=0.8)), counted(random_pairs(20, right=0.5))
    found = paired_interval([better], [worse])
    low, high = ends_of(found)
    assert 0 < low < found.difference < high
    assert found.difference == pytest.approx(scores(better).miou - scores(worse).miou)


def test_interval_of_equally_good_sources_contains_zero() -> None:
    found = paired_interval([counted(random_pairs(20, seed=1))], [counted(random_pairs(20, seed=2))])
    low, high = ends_of(found)
    assert low < 0 < high
    assert found.difference != 0


def test_swapped_sides_mirror_the_interval() -> None:
    ours, theirs = counted(random_pairs(12, right=0.7)), counted(random_pairs(12, seed=1))
    there, back = paired_interval([ours], [theirs]), paired_interval([theirs], [ours])
    low, high = ends_of(there)
    assert (back.difference, *ends_of(back)) == pytest.approx((-there.difference, -high, -low))
    assert low < high


def test_an_interval_is_the_same_each_time() -> None:
    ours, theirs = counted(random_pairs(12, right=0.7)), counted(random_pairs(12, seed=1))
    assert paired_interval([ours], [theirs]) == paired_interval([ours], [theirs])


def test_differences_are_averaged_over_seeds() -> None:
    ours = [counted(random_pairs(8, seed=seed, right=0.7)) for seed in range(3)]
    theirs = [counted(random_pairs(8, seed=seed, right=0.6)) for seed in range(3)]
    each = [scores(a).miou - scores(b).miou for a, b in zip(ours, theirs, strict=True)]
    assert paired_interval(ours, theirs).difference == pytest.approx(sum(each) / 3)


def test_two_images_give_a_difference_without_an_interval() -> None:
    ours = Counts.joined([image_of([4, 1], [4, 1], [4, 1]), image_of([0, 1], [4, 1], [0, 1])])
    theirs = Counts.joined([image_of([0, 1], [4, 1], [0, 1]), image_of([0, 1], [4, 1], [0, 1])])
    assert paired_interval([ours], [theirs]) == Interval(25.0, None, None, 2)


def test_an_interval_of_400_images() -> None:
    """Half of 400 images are right in one of two classes: their mean has a standard deviation of 2.5 points."""
    ours = Counts.joined([image_of([number % 2, 1], [1, 1], [number % 2, 1]) for number in range(400)])
    theirs = Counts.joined([image_of([0, 1], [1, 1], [0, 1])] * 400)
    found = paired_interval([ours], [theirs])
    assert (found.difference, found.low, found.high) == pytest.approx((25, 25 - 2.46, 25 + 2.46), abs=0.02)


def test_pairing_narrows_the_interval() -> None:
    """Images of very different difficulty, each a little better: paired by image, the difference is certain."""
    hard = [image_of([10 * n + 5, 1], [200, 1], [10 * n + 5, 1]) for n in range(15)]
    easier = [image_of([10 * n + 8, 1], [200, 1], [10 * n + 8, 1]) for n in range(15)]
    found = paired_interval([Counts.joined(easier)], [Counts.joined(hard)])
    assert (found.difference, found.low, found.high) == pytest.approx((0.75, 0.75, 0.75))
    low, high = ends_of(paired_interval([Counts.joined(easier)], [Counts.joined(hard[::-1])]))
    assert low < 0 < high


def test_images_without_labels_do_not_widen_the_interval() -> None:
    """Such images are not groups: five groups are left."""
    ours = Counts.joined([*[image_of([4, 1], [4, 1], [4, 1])] * 5, *[Counts.nothing(2)] * 3])
    theirs = Counts.joined([*[image_of([2, 1], [4, 1], [2, 3])] * 5, *[Counts.nothing(2)] * 3])
    found = paired_interval([ours], [theirs])
    assert found.difference == found.low == found.high == pytest.approx(100 - 50 * (1 / 2 + 1 / 3))
    assert found.groups == 5


def test_other_images_or_seeds_cannot_be_paired() -> None:
    three, four = counted(random_pairs(3)), counted(random_pairs(4))
    for left, right in (([three], [four]), ([three], [three, three])):
        with pytest.raises(EvaluationError, match="same items and seeds for both sources"):
            paired_interval(left, right)
