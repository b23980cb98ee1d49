"""Sufficient statistics: sums by hand, streaming, clipping, and errors."""

from __future__ import annotations

import pytest
import torch

from denoising_vit.decomposition.statistics import Statistics, clip_norms, field_products, weighted_sum
from denoising_vit.errors import BackboneError
from denoising_vit.views.plan import ViewPlan


def plan(views: int = 7, taper: float = 0.0) -> ViewPlan:
    return ViewPlan.make(views, size=(5 * 14, 7 * 14), patch_size=14, resolution=(11, 13), taper=taper)


@pytest.mark.parametrize("taper", [0.0, 0.4])
def test_sums_match_a_view_by_view_computation(taper: float) -> None:
    views = plan(taper=taper)
    rows, columns = views.windows
    wy, wx = views.weights
    features = torch.randn(7, 5, 7, 3, dtype=torch.float64)
    statistics = Statistics(views, 3)
    for batch in features.split([1, 2, 4]):
        statistics.add(batch)
    weighed = [torch.outer(rows[v], columns[v])[..., None] * features[v] for v in range(7)]
    b = sum(torch.einsum("yr,yxc,xs->rsc", wy[v], weighed[v], wx[v]) for v in range(7))
    assert torch.allclose(statistics.b, torch.as_tensor(b), atol=1e-12)
    assert torch.allclose(statistics.g, torch.stack(weighed).sum(0), atol=1e-12)
    assert statistics.views_seen == 7


def test_one_patch_contributes_to_its_four_nodes() -> None:
    """A single sample at row weights (1/4, 3/4) and column weights (1/2, 1/2)."""
    wy = torch.tensor([[[0.25, 0.75, 0.0]]])  # (1 view, 1 row, 3 nodes)
    wx = torch.tensor([[[0.0, 0.5, 0.5]]])
    spread = field_products(torch.full((1, 1, 1, 1), 8.0), wy, wx)[..., 0]
    assert spread.tolist() == [[0, 1, 1], [0, 3, 3], [0, 0, 0]]


def test_bfloat16_features_are_summed_in_double_precision() -> None:
    views = plan()
    features = torch.randn(7, 5, 7, 3).bfloat16()
    low, high = Statistics(views, 3), Statistics(views, 3)
    low.add(features)
    high.add(features.double())
    assert low.b.dtype == torch.float64
    assert torch.equal(low.b, high.b)


def test_more_views_than_planned_and_other_shapes_are_refused() -> None:
    statistics = Statistics(plan(), 3)
    with pytest.raises(ValueError, match=r"expected features of shape \(B, 5, 7, 3\), got \(1, 7, 5, 3\)"):
        statistics.add(torch.zeros(1, 7, 5, 3))
    statistics.add(torch.zeros(6, 5, 7, 3))
    with pytest.raises(ValueError, match="the plan has 7 views, got 8"):
        statistics.add(torch.zeros(2, 5, 7, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_features_are_refused_and_counted(value: float) -> None:
    features = torch.zeros(2, 5, 7, 3)
    features[1, 2, 3] = value
    with pytest.raises(BackboneError, match="3 of 210 feature values are not finite"):
        Statistics(plan(), 3).add(features)


def test_large_finite_features_are_accepted() -> None:
    Statistics(plan(), 3).add(torch.full((2, 5, 7, 3), 1e37))  # their float32 sum overflows


def test_clipping_scales_outliers_to_the_bound_and_leaves_the_rest() -> None:
    features = torch.zeros(1, 1, 5, 2)
    features[0, 0, :, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0])  # median 3, MAD 1: bound 3 + 2 = 5
    clipped, count = clip_norms(features, k=2.0)
    assert count == 1
    assert clipped[0, 0, :, 0].tolist() == [1, 2, 3, 4, 5]


def test_clipping_is_per_view() -> None:
    features = torch.ones(2, 1, 5, 1)
    features[1] *= 50
    assert clip_norms(features, k=1.0)[1] == 0


def test_clipping_is_counted_and_bounds_the_sums() -> None:
    torch.manual_seed(0)
    features = torch.randn(7, 5, 7, 3)
    features[3, 2, 2] = 1e4
    free, bound = Statistics(plan(), 3), Statistics(plan(), 3, clip=10.0)
    free.add(features)
    bound.add(features)
    assert free.clipped_tokens == 0
    assert bound.clipped_tokens == 1
    assert bound.b.norm() < 0.05 * free.b.norm()


def test_clip_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        Statistics(plan(), 3, clip=0.0)


def test_weighted_sum_matches_einsum() -> None:
    chance = torch.Generator().manual_seed(0)
    features = torch.randn(4, 5, 7, 3, dtype=torch.float64, generator=chance)
    rows, columns = (torch.rand(4, count, dtype=torch.float64, generator=chance) for count in (5, 7))
    expected = torch.einsum("vyxc,vy,vx->yxc", features, rows, columns)
    torch.testing.assert_close(weighted_sum(features, rows, columns), expected)
