"""Label-free token metrics: values by hand, invariances, and what each metric detects and ignores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.metrics.checks import checked
from denoising_vit.metrics.tokens import (
    OutlierShare,
    detail,
    effective_rank,
    leakage,
    neighbour_similarity,
    outlier_share,
    shared_pattern,
    typical_energy,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(channels: int) -> Tensor:
    return torch.linalg.qr(noise(channels, channels, seed=9)).Q


def grid(*rows: list[float]) -> Tensor:
    """One image with one channel: (1, h, w, 1)."""
    return torch.tensor(rows)[None, ..., None]


def blurred(features: Tensor) -> Tensor:
    """Means over 3 x 3 patches, (N, h, w, C)."""
    return torch.nn.functional.avg_pool2d(features.movedim(-1, 1), 3, 1, 1, count_include_pad=False).movedim(1, -1)


def test_outliers_by_hand() -> None:
    # Median 0 and MAD 0.1 of 77 log-norms, so the limits are +- 5 x 0.14826 = 0.7413.
    log_norms = torch.tensor([-0.1] * 36 + [0.1] * 36 + [0, 0.73, 0.75, -0.8, -0.8])
    share = outlier_share(log_norms.exp().view(1, 7, 11, 1))
    assert share == OutlierShare(high=1 / 77, low=2 / 77)
    assert share.total == pytest.approx(3 / 77)


def test_outliers_of_all_images_share_one_median() -> None:
    features = noise(4, 7, 11, 64)
    features[3] *= 5
    assert outlier_share(features) == OutlierShare(high=0.25, low=0)


def test_clean_features_have_no_outliers() -> None:
    assert outlier_share(noise(4, 37, 37, 64)).total == 0
    log_normal = torch.nn.functional.normalize(noise(4, 37, 37, 3), dim=-1) * (0.3 * noise(4, 37, 37, 1)).exp()
    assert outlier_share(log_normal).total == 0
    assert outlier_share(log_normal, bound=2).total == pytest.approx(0.0455, abs=0.01)


def test_outliers_without_spread() -> None:
    unit = torch.nn.functional.normalize(noise(3, 5, 7, 11), dim=-1)
    assert outlier_share(unit).total == 0
    unit[0, 0, 0], unit[1, 1, 1] = 0, 2 * unit[1, 1, 1]
    assert outlier_share(unit) == OutlierShare(high=1 / 105, low=1 / 105)


def test_nearly_equal_norms_are_not_outliers() -> None:
    signs = torch.where(noise(3, 5, 7, 1) > 0, 1.0, -1.0)  # MAD = 0
    signs[0, 0, 0], signs[0, 1, 1] = 1.001, 1.01
    assert outlier_share(signs) == OutlierShare(high=1 / 105, low=0)


def test_outliers_ignore_scale_and_rotation() -> None:
    features = noise(3, 5, 7, 11) * (noise(3, 5, 7, 1, seed=1) > 1.5).float().mul(40).add(1)
    share = outlier_share(features)
    assert share.high > 0
    assert outlier_share(1e3 * features @ rotation(11)) == share


def test_effective_rank_by_hand() -> None:
    # Singular values 2, 1, 1: entropy of (1/2, 1/4, 1/4) is 1.5 log 2.
    tokens = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]])
    assert effective_rank(tokens.view(1, 1, 5, 3)) == pytest.approx(2**1.5)
    assert effective_rank(tokens.view(5, 1, 1, 3)) == pytest.approx(2**1.5)  # images are stacked
    assert effective_rank(-3 * tokens.view(1, 1, 5, 3) @ rotation(3)) == pytest.approx(2**1.5, rel=1e-5)


def test_effective_rank_is_not_centred() -> None:
    features = noise(3, 5, 7, 11)
    assert 10 < effective_rank(features) <= 11
    assert effective_rank(features + 100) < 2


def test_effective_rank_of_few_directions() -> None:
    features = noise(3, 5, 7, 2) @ noise(2, 11, seed=1)
    assert 1 < effective_rank(features) < 2.01


def test_similarity_by_hand() -> None:
    # Centred: -1, -1, 2, so one pair agrees and one does not.
    assert neighbour_similarity(grid([0, 0, 3])) == pytest.approx(0)
    # Two pairs along rows agree, two along columns do not; and the other way round.
    assert neighbour_similarity(grid([1, 1], [-1, -1])) == pytest.approx(0)
    assert neighbour_similarity(grid([1, -1, 1], [1, -1, 1])) == pytest.approx((3 - 4) / 7)


def test_similarity_rises_with_blur() -> None:
    features = noise(3, 17, 19, 11)
    assert abs(neighbour_similarity(features)) < 0.03
    assert neighbour_similarity(blurred(features)) > 0.5


def test_detail_by_hand() -> None:
    # Differences 0 and 3, variance 2: (0 + 9) / 2 / (2 x 2).
    assert detail(grid([0, 0, 3])) == pytest.approx(9 / 8)
    # Of 7 pairs, the 4 along rows differ by 2; the variance is 8/9.
    assert detail(grid([1, -1, 1], [1, -1, 1])) == pytest.approx(16 / 7 / (16 / 9))
    assert detail(grid([1, 1], [-1, -1])) == pytest.approx(1)


def test_detail_orders_noise_blur_and_checkerboard() -> None:
    features = noise(3, 17, 19, 11)
    assert detail(features) == pytest.approx(1, abs=0.02)
    assert detail(blurred(features)) < 0.5
    board = ((torch.arange(17)[:, None] + torch.arange(19)) % 2).float()[None, ..., None]
    assert detail(board) == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize("metric", [neighbour_similarity, detail])
def test_smoothness_ignores_shift_scale_and_rotation(metric) -> None:
    features = blurred(noise(3, 5, 7, 11))
    changed = 0.01 * features @ rotation(11) + noise(11, seed=4)
    assert metric(changed) == pytest.approx(metric(features), abs=1e-4)


def test_smoothness_does_not_cross_images() -> None:
    features = torch.cat([grid([5, 5, 5]), grid([-5, -5, -5])])
    assert neighbour_similarity(features) == pytest.approx(1)
    assert detail(features) == 0


def test_shared_pattern_by_hand() -> None:
    """Means of images 0 and 1, 2 and 3: (1, -1) times 2 and 4, so 8 per patch. Median token -1, squared distance 4."""
    features = torch.cat([grid([1, -1]), grid([3, -3]), grid([3, -3]), grid([5, -5])])
    assert shared_pattern(features + 100) == pytest.approx(8 / 4, rel=1e-5)


def test_shared_pattern_of_a_planted_artifact() -> None:
    artifact = noise(17, 19, 11, seed=1)
    features = artifact + noise(8, 17, 19, 11) + 3
    assert shared_pattern(features) == pytest.approx(0.5, abs=0.06)  # the median of 11 squares is below their mean
    turn = rotation(11)
    assert shared_pattern(features @ turn) == pytest.approx(shared_pattern(features), rel=0.05)
    assert abs(shared_pattern(noise(8, 17, 19, 11))) < 0.01


def test_alternating_pattern_is_not_a_shared_pattern() -> None:
    """Every other image has the opposite sign: the pattern cancels in both halves."""
    content = noise(17, 19, 11, seed=2)
    turned = torch.stack([content, -content] * 4)
    assert abs(shared_pattern(turned + 0.1 * noise(8, 17, 19, 11))) < 0.01


def test_shared_pattern_is_robust_to_outliers() -> None:
    features = noise(17, 19, 11, seed=1) + noise(8, 17, 19, 11)
    spoiled = torch.where(noise(8, 17, 19, 1, seed=5) > 2, features * 30, features)
    assert shared_pattern(spoiled) == pytest.approx(shared_pattern(features), rel=0.1)


def test_typical_energy() -> None:
    assert typical_energy(grid([0, 1, 3, 6, 100])) == 9  # distances from 3: 3, 2, 0, 3, 97
    features = noise(8, 17, 19, 200)
    spoiled = torch.where(noise(8, 17, 19, 1, seed=5) > 2, features * 30, features)
    assert typical_energy(features) == pytest.approx(200, rel=0.02)
    assert typical_energy(spoiled) == pytest.approx(200, rel=0.03)
    empty = grid([7.0] * 9 + [9.0])
    assert typical_energy(empty) == pytest.approx(0.36)  # most tokens are the same: the variance


def test_leakage_by_hand() -> None:
    # Variances 3, 1 and 0; the responses vary along the first channel only, and differ by a constant along the second.
    features = torch.tensor([[3**0.5, 1, 0], [-(3**0.5), 1, 0], [3**0.5, -1, 0], [-(3**0.5), -1, 0]]).view(1, 2, 2, 3)
    responses = torch.zeros(2, 1, 5, 3)
    responses[..., 0] = torch.arange(5.0)
    responses[0, ..., 1], responses[1, ..., 1] = 1000, -1000
    assert leakage(features, responses, rank=1) == pytest.approx(0.75)
    assert leakage(features + 50, responses - 9, rank=1) == pytest.approx(0.75)
    assert leakage(features[..., [2, 1, 0]], responses, rank=1) == 0


def test_leakage_takes_the_strongest_directions() -> None:
    features, responses = noise(2, 7, 11, 5), noise(2, 5, 7, 5, seed=1)
    features[..., 2] *= 10
    responses[..., 2] *= 10
    assert leakage(features, responses, rank=1) > 0.9
    assert leakage(features, responses, rank=5) == pytest.approx(1)
    turn = rotation(5)
    expected = leakage(features, responses, rank=2)
    assert leakage(3 * features @ turn, 7 * responses @ turn, rank=2) == pytest.approx(expected, abs=1e-5)


def test_leakage_of_isotropic_features_is_rank_over_channels() -> None:
    assert leakage(noise(8, 17, 19, 11), noise(1, 7, 7, 11, seed=1), rank=3) == pytest.approx(3 / 11, abs=0.02)


def test_leakage_errors() -> None:
    features, responses = noise(2, 3, 5, 7), noise(1, 3, 5, 2) @ noise(2, 7, seed=1)
    with pytest.raises(EvaluationError, match="vary over positions in 2 directions, but rank is 3"):
        leakage(features, responses, rank=3)
    with pytest.raises(EvaluationError, match="in 0 directions"):
        leakage(features, torch.ones(2, 3, 5, 7) * noise(2, 1, 1, 7), rank=1)
    with pytest.raises(EvaluationError, match="7 channels, but the responses 6"):
        leakage(features, responses[..., :6], rank=1)
    with pytest.raises(EvaluationError, match="rank must be 1 to 7"):
        leakage(features, responses, rank=8)
    with pytest.raises(EvaluationError, match="values of responses are not finite"):
        leakage(features, responses / 0, rank=1)


def test_shape_errors() -> None:
    with pytest.raises(EvaluationError, match="a shared pattern needs at least 4 images, got 3"):
        shared_pattern(noise(3, 3, 5, 7))
    with pytest.raises(EvaluationError, match="bound must be positive, got 0"):
        outlier_share(noise(2, 3, 5, 7), bound=0)
    for metric in (neighbour_similarity, detail):
        with pytest.raises(EvaluationError, match="grid of at least 2 patches"):
            metric(noise(4, 1, 1, 7))


METRICS = [
    outlier_share,
    effective_rank,
    neighbour_similarity,
    detail,
    shared_pattern,
    typical_energy,
    lambda features: leakage(features, noise(1, 3, 5, 7), rank=1),
]


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_refuses_invalid_features(metric) -> None:
    with pytest.raises(EvaluationError, match="constant output: all 30 tokens of features are the same"):
        metric(torch.full((2, 3, 5, 7), 0.1))
    with pytest.raises(EvaluationError, match=r"expected features of non-empty shape \(N, h, w, C\).*got \(3, 5, 7\)"):
        metric(noise(3, 5, 7))
    features = noise(2, 3, 5, 7)
    features[0, 0, 0, :2] = torch.tensor([math.inf, math.nan])
    with pytest.raises(EvaluationError, match="2 of 210 values of features are not finite"):
        metric(features)


def test_checked_returns_float32_and_refuses_nearly_constant_features() -> None:
    features = noise(2, 3, 5, 7).half().requires_grad_()
    result = checked(features)
    assert result.dtype == torch.float32 and not result.requires_grad
    assert torch.equal(result, features.detach().float())
    with pytest.raises(EvaluationError, match="constant output"):
        checked(1000 + 1e-4 * noise(2, 3, 5, 7))
    checked(1000 + 1e-1 * noise(2, 3, 5, 7))
    with pytest.raises(EvaluationError, match=r"got \(0, 3, 5, 7\)"):
        checked(torch.zeros(0, 3, 5, 7))
