"""Position probes: values by hand, planted codes that only one of the probes detects, and invariances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.metrics.position import linear_position_r2, neighbour_position_r2


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coordinates(h: int, w: int) -> tuple[Tensor, Tensor]:
    """x and y of the patch centres, each (h, w)."""
    x, y = (torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h
    return x.expand(h, w), y[:, None].expand(h, w)


def rotation(channels: int) -> Tensor:
    return torch.linalg.qr(noise(channels, channels, seed=9)).Q


def signed_code(images: int, h: int, w: int, channels: int) -> Tensor:
    """A smooth code of the position whose sign alternates between images; each half has as many of either sign."""
    x, y = coordinates(h, w)
    frequency, phase = 3 * noise(2, channels, seed=1), 6 * noise(channels, seed=2)
    code = torch.cos(x[..., None] * frequency[0] + y[..., None] * frequency[1] + phase)
    signs = torch.tensor([1.0, -1.0]).repeat(images // 2)
    return signs[:, None, None, None] * code


def test_linear_ridge_by_hand() -> None:
    # One standardised channel equal to x: its weight is 1 / (1 + ridge), so half of x is predicted, and nothing of y.
    features = coordinates(5, 7)[0].expand(4, 5, 7)[..., None]
    assert linear_position_r2(features, train=2, ridge=1.0) == pytest.approx((0.75 + 0) / 2, abs=1e-6)
    assert linear_position_r2(features, train=2, ridge=0.0) == pytest.approx(0.5, abs=1e-6)


def test_linear_with_noise_of_known_variance() -> None:
    x, y = coordinates(11, 13)
    features = torch.stack([x, y], dim=-1) + 0.2 * noise(60, 11, 13, 2)
    expected = [float(v.var(correction=0)) / (float(v.var(correction=0)) + 0.04) for v in (x, y)]
    assert linear_position_r2(features, train=30, ridge=0.0) == pytest.approx(sum(expected) / 2, abs=0.02)


def test_linear_is_tested_on_the_other_images() -> None:
    features = noise(8, 5, 7, 3)
    features[:4, ..., 0] = coordinates(5, 7)[0]
    assert linear_position_r2(features, train=4) < 0
    assert linear_position_r2(features[:4], train=2) > 0.45


def test_linear_ignores_scale_and_shift_of_channels() -> None:
    features = noise(6, 5, 7, 3) + 4 * coordinates(5, 7)[1][..., None]
    score = linear_position_r2(features, train=3)
    changed = features * torch.tensor([0.01, 3, 200]) + torch.tensor([5.0, -7, 0])
    assert score > 0.2
    assert linear_position_r2(changed, train=3) == pytest.approx(score, abs=1e-4)


def test_linear_allows_dead_and_dependent_channels() -> None:
    features = coordinates(5, 7)[0].expand(4, 5, 7)[..., None].repeat(1, 1, 1, 3)
    features[..., 2] = 4
    assert linear_position_r2(features, train=2, ridge=0.0) == pytest.approx(0.5, abs=1e-6)


def test_neighbours_detect_position_that_remains_without_the_mean() -> None:
    features = signed_code(16, 7, 11, 19) + 0.05 * noise(16, 7, 11, 19)
    features = features - features.mean(0)
    assert abs(linear_position_r2(features, train=8)) < 0.05
    assert neighbour_position_r2(features, train=8, neighbours=3) > 0.9


def test_neighbours_find_nothing_in_noise() -> None:
    score = neighbour_position_r2(noise(16, 7, 11, 5), train=8, neighbours=20)
    assert score == pytest.approx(-1 / 20, abs=0.03)


def test_neighbours_by_hand() -> None:
    # Every patch has its own direction, so with 2 training images the 2 nearest are its own place in both: exact.
    features = torch.eye(15).view(1, 3, 5, 15).repeat(4, 1, 1, 1)
    assert neighbour_position_r2(features, train=2, neighbours=2) == pytest.approx(1)
    # All 30 training patches as neighbours predict the centre: R^2 = 0.
    assert neighbour_position_r2(features, train=2, neighbours=30) == pytest.approx(0, abs=1e-12)


def test_neighbours_ignore_scale_rotation_and_shift() -> None:
    features = signed_code(8, 5, 7, 11) + 0.5 * noise(8, 5, 7, 11)
    score = neighbour_position_r2(features, train=4, neighbours=3)
    assert 0.1 < score < 0.95
    changed = 30 * features @ rotation(11) + 5 * noise(11, seed=4)
    assert neighbour_position_r2(changed, train=4, neighbours=3) == pytest.approx(score, abs=1e-6)


def test_neighbours_sample_tokens_by_seed() -> None:
    features = signed_code(8, 5, 7, 11) + 0.5 * noise(8, 5, 7, 11)
    scores = [
        neighbour_position_r2(features, train=4, neighbours=3, tokens_per_image=17, seed=seed) for seed in (0, 0, 1)
    ]
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.parametrize("probe", [linear_position_r2, neighbour_position_r2])
def test_invalid_features_raise(probe) -> None:
    with pytest.raises(EvaluationError, match="at least 2 images to fit and 2 to test, got 1 and 4; give at least 4"):
        probe(noise(5, 3, 5, 2), train=1)
    with pytest.raises(EvaluationError, match="got 4 and 1"):
        probe(noise(5, 3, 5, 2), train=4)
    with pytest.raises(EvaluationError, match="grid of at least 2 x 2 patches, got 1 x 5"):
        probe(noise(5, 1, 5, 2), train=2)
    with pytest.raises(EvaluationError, match="constant output: all 75 tokens of features"):
        probe(torch.full((5, 3, 5, 2), 0.3), train=2)
    only_test = torch.cat([torch.ones(2, 3, 5, 2), noise(2, 3, 5, 2)])
    with pytest.raises(EvaluationError, match="constant output: all 30 tokens of the training images"):
        probe(only_test, train=2)
    broken = noise(5, 3, 5, 2)
    broken[0, 1, 2, 0] = math.nan
    with pytest.raises(EvaluationError, match="1 of 150 values of features are not finite"):
        probe(broken, train=2)


def test_invalid_options_raise() -> None:
    features = noise(4, 3, 5, 2)
    with pytest.raises(EvaluationError, match="at least 31 training patches for 31 neighbours, got 30"):
        neighbour_position_r2(features, train=2, neighbours=31)
    with pytest.raises(EvaluationError, match="at least 1, got 0 and 9"):
        neighbour_position_r2(features, train=2, neighbours=0, tokens_per_image=9)
    with pytest.raises(EvaluationError, match="ridge must be at least 0, got -1"):
        linear_position_r2(features, train=2, ridge=-1)
