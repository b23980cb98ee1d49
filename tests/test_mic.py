"""The maximal information coefficient: values by hand, exhaustive search, ties, planted position."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from denoising_vit.errors import EvaluationError
from denoising_vit.metrics.position import mic, position_mic


def information(first: np.ndarray, second: np.ndarray) -> float:
    """Mutual information of two labellings, from its definition."""
    total = 0.0
    for i, j in itertools.product(set(first.tolist()), set(second.tolist())):
        joint = np.mean((first == i) & (second == j))
        if joint:
            total += joint * math.log(joint / (np.mean(first == i) * np.mean(second == j)))
    return total


def partitions(values: np.ndarray, bins: int):
    """Every cut of the distinct values into ``bins`` intervals, as labels."""
    distinct = np.unique(values)
    for cuts in itertools.combinations(distinct[1:], bins - 1):
        yield np.searchsorted(np.array(cuts), values, side="right")


def equal_mass(values: np.ndarray, bins: int) -> np.ndarray:
    middle = np.array([np.sum(values < v) + np.sum(values == v) / 2 for v in values])
    return np.floor(middle * bins / len(values) + 1e-9)


def exhaustive_mic_e(a: np.ndarray, b: np.ndarray, cells: int) -> float:
    best = 0.0
    for equal, optimal in ((a, b), (b, a)):
        for bins in range(2, cells // 2 + 1):
            labels = equal_mass(equal, bins)
            for k in range(2, min(bins, cells // bins) + 1):
                scores = [information(labels, cut) for cut in partitions(optimal, k)]
                best = max(best, max(scores, default=0) / math.log(k))
    return best


def exhaustive_mic(a: np.ndarray, b: np.ndarray, cells: int) -> float:
    best = 0.0
    for k, bins in itertools.product(range(2, cells // 2 + 1), repeat=2):
        if k * bins <= cells:
            both = itertools.product(partitions(a, k), partitions(b, bins))
            best = max(best, max(information(p, q) for p, q in both) / math.log(min(k, bins)))
    return best


@pytest.mark.parametrize("n", [12, 13, 16])
def test_equals_an_exhaustive_search(n: int) -> None:
    stream = np.random.default_rng(n)
    for _ in range(2):
        a, b = stream.normal(size=n), stream.normal(size=n)
        assert mic(a, b, exponent=1.0) == pytest.approx(exhaustive_mic_e(a, b, n), abs=1e-12)


def test_equals_an_exhaustive_search_with_ties() -> None:
    stream = np.random.default_rng(3)
    for _ in range(8):
        a, b = stream.integers(0, 6, 14) ** 2, np.round(2 * stream.exponential(size=14))
        assert len(np.unique(b)) < 10
        assert mic(a, b, exponent=1.0) == pytest.approx(exhaustive_mic_e(a, b, 14), abs=1e-12)


def test_is_at_most_the_search_over_all_grids() -> None:
    stream = np.random.default_rng(5)
    a, b = stream.normal(size=12), stream.normal(size=12)
    everything = exhaustive_mic(a, b, 8)
    assert 0.5 * everything < mic(a, b, exponent=math.log(8.01) / math.log(12)) <= everything + 1e-12


def test_four_points_by_hand() -> None:
    # One 2 x 2 grid: halves of a against b cut after its first value, I = H(1/4) - H(1/2) / 2 bits.
    assert mic(np.array([0, 1, 2, 3]), np.array([0, 2, 1, 3])) == pytest.approx(1.5 - 0.75 * math.log2(3))


@pytest.mark.parametrize("relation", [np.exp, np.negative, np.cbrt, np.square, lambda v: np.abs(v) > 0.5])
def test_noiseless_relations_score_one(relation) -> None:
    a = (np.arange(1000) + 0.5) / 500 - 1
    assert mic(a, relation(a)) == pytest.approx(1, abs=1e-12)


def test_independent_data_show_the_known_bias_only() -> None:
    stream = np.random.default_rng(0)
    scores = [mic(stream.normal(size=400), stream.normal(size=400)) for _ in range(10)]
    assert 0.05 < np.mean(scores) < 0.08


def test_noise_lowers_the_score() -> None:
    stream = np.random.default_rng(1)
    a, noise = stream.normal(size=500), stream.normal(size=500)
    scores = [mic(a, a + level * noise) for level in (0, 0.3, 1, 3)]
    assert scores == sorted(scores, reverse=True) and scores[0] - scores[3] > 0.8


def test_score_depends_on_ranks_only() -> None:
    stream = np.random.default_rng(2)
    a, b = stream.normal(size=101), stream.normal(size=101)
    score = mic(a, b)
    assert mic(b, a) == score
    assert mic(np.exp(3 * a), b) == score
    assert mic(torch.tensor(a), torch.tensor(7 * b - 2)) == score


def test_ties_are_never_split() -> None:
    index = np.arange(90)
    # Splitting ties by their order would make this 1.
    assert mic(np.zeros(90), index) == pytest.approx(0, abs=1e-12)
    few = np.random.default_rng(4).integers(0, 3, 90)
    shuffle = np.random.default_rng(5).permutation(90)
    assert mic(few[shuffle], index[shuffle]) == mic(few, index)


def test_position_of_planted_channels() -> None:
    features = torch.randn(2, 7, 11, 5, generator=torch.Generator().manual_seed(0))
    noise = position_mic(features)
    assert noise < 0.4
    features[..., 3] = -2 * torch.arange(11.0)
    only_x = position_mic(features)
    features[..., 1] = torch.arange(7.0)[:, None].exp()
    assert 0.97 < position_mic(features) <= 1
    assert noise + 0.2 < only_x < position_mic(features) - 0.2
    assert position_mic(features[..., [4, 1, 0, 2, 3]]) == position_mic(features)


def test_position_averages_images() -> None:
    features = torch.randn(2, 5, 7, 3, generator=torch.Generator().manual_seed(1))
    features[0, ..., 0], features[0, ..., 1] = torch.arange(5.0)[:, None], torch.arange(7.0)
    parts = [position_mic(image[None]) for image in features]
    assert parts[0] > parts[1] + 0.2
    assert position_mic(features) == pytest.approx(sum(parts) / 2)


def test_channels_beyond_one_batch_are_included() -> None:
    features = torch.zeros(1, 5, 7, 131)
    features[..., 130] = torch.arange(7.0)
    assert position_mic(features) == pytest.approx(mic(torch.arange(35) % 7, torch.arange(35) % 7) / 2)


def test_errors() -> None:
    with pytest.raises(EvaluationError, match=r"equal length, at least 4, got \(5,\) and \(6,\)"):
        mic(np.arange(5), np.arange(6))
    with pytest.raises(EvaluationError, match="at least 4"):
        mic(np.arange(3), np.arange(3))
    with pytest.raises(EvaluationError, match="finite values"):
        mic(np.array([0, 1, 2, np.nan]), np.arange(4))
    with pytest.raises(EvaluationError, match=r"exponent must be in \(0, 1\], got 1.5"):
        mic(np.arange(5), np.arange(5), exponent=1.5)
    with pytest.raises(EvaluationError, match="constant output"):
        position_mic(torch.ones(2, 3, 5, 2))
    with pytest.raises(EvaluationError, match="at least 4 patches, got 1 x 3"):
        position_mic(torch.randn(2, 1, 3, 2))
