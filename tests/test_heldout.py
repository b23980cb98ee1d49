"""Held-out metrics against hand-computed ones."""

from __future__ import annotations

import pytest
import torch

from denoising_vit.decomposition.statistics import HeldOut
from denoising_vit.views.plan import ViewPlan

PLAN = ViewPlan.make(3, size=(28, 42), patch_size=14, resolution=(5, 6), full_image=False)


def predicted(field: torch.Tensor, artifact: torch.Tensor) -> torch.Tensor:
    wy, wx = PLAN.weights
    return torch.einsum("vyr,rsc,vxs->vyxc", wy, field, wx) + artifact


def test_a_perfect_prediction_scores_one() -> None:
    field, artifact = torch.randn(5, 6, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    judge = HeldOut(field, artifact, PLAN)
    for batch in predicted(field, artifact).split(2):
        judge.add_views(batch)
    assert judge.r2 == pytest.approx(1)
    assert judge.cosine == pytest.approx(1)


def test_offsets_explain_a_constant_in_each_view() -> None:
    field, artifact = torch.randn(5, 6, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    moved = predicted(field, artifact) + torch.randn(3, 1, 1, 4, dtype=torch.float64)
    plain, judge = HeldOut(field, artifact, PLAN), HeldOut(field, artifact, PLAN, offsets=True)
    for batch in moved.split(2):
        plain.add_views(batch)
        judge.add_views(batch)
    assert judge.r2 == pytest.approx(1)
    assert plain.r2 is not None and plain.r2 < 0.9


def test_r2_is_measured_about_the_mean_of_each_channel() -> None:
    truth = torch.randn(3, 2, 3, 4, dtype=torch.float64) + torch.tensor([0.0, 10, -20, 30])
    field = torch.zeros(5, 6, 4, dtype=torch.float64)
    artifact = truth.mean((0, 1, 2)).expand(2, 3, 4)  # predicts each channel's mean and nothing more
    judge = HeldOut(field, artifact, PLAN)
    judge.add_views(truth)
    assert judge.r2 == pytest.approx(0, abs=1e-9)
    expected = torch.cosine_similarity(truth, artifact.expand_as(truth), dim=-1).mean()
    assert judge.cosine == pytest.approx(float(expected))


def test_half_of_the_variance_unexplained_gives_r2_of_one_half() -> None:
    field, artifact = torch.zeros(5, 6, 1, dtype=torch.float64), torch.zeros(2, 3, 1, dtype=torch.float64)
    artifact[0] = 1.0
    truth = artifact.expand(3, 2, 3, 1) * 2.0  # variance 1, prediction off by 1 on half of the tokens
    judge = HeldOut(field, artifact, PLAN)
    judge.add_views(truth)
    assert judge.r2 == pytest.approx(0.5)


def test_constant_features_have_no_r2() -> None:
    judge = HeldOut(torch.ones(5, 6, 2, dtype=torch.float64), torch.zeros(2, 3, 2, dtype=torch.float64), PLAN)
    judge.add_views(torch.ones(3, 2, 3, 2))
    assert judge.r2 is None
    assert judge.cosine == pytest.approx(1)
