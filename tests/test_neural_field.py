"""The neural field: its training loop against steps by hand, planted fields and artifacts, options, and stage 1."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage import data
from torch import Tensor, nn

import denoising_vit as dv
import denoising_vit.maps
from denoising_vit import Backbone, BackboneError, Decomposition, FitError, NeuralFieldOptions, PlanError, ViewPlan
from denoising_vit.cli import app
from denoising_vit.cli import denoise_job as verb
from denoising_vit.decomposition.inputs import extract_views, prepare
from denoising_vit.decomposition.methods import gather
from denoising_vit.decomposition.neural_field import fit as loop
from denoising_vit.decomposition.neural_field.fit import (
    Evaluation,
    NeuralFit,
    SeenViews,
    evaluate,
    fit_neural_field,
    learning_rate,
)
from denoising_vit.decomposition.neural_field.model import NeuralModel
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.denoise import work
from denoising_vit.views.patch_grid import patch_centres
from denoising_vit.views.rendering import to_image

pytestmark = pytest.mark.usefixtures("one_thread")

PATCH, GRID, CHANNELS = 8, (5, 7), 3
TINY = NeuralFieldOptions(
    steps=20, tokens=64, levels=3, coarsest=2, finest=8, level_channels=2, table_size=40, field_hidden=8,
    residual_hidden=4, evaluate_every=5,
)  # fmt: skip


def tiny(**changes: Any) -> NeuralFieldOptions:
    return dataclasses.replace(TINY, **changes)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_plan(views: int, seed: int = 0) -> ViewPlan:
    h, w = GRID
    return ViewPlan.make(
        views, size=(h * PATCH, w * PATCH), patch_size=PATCH, resolution=(3 * h, 3 * w), seed=seed, full_image=seed == 0
    )


def noisy_views(views: int = 12, seed: int = 0) -> SeenViews:
    """Random features, which no model can predict."""
    return SeenViews(make_plan(views, seed), noise(views, *GRID, CHANNELS, seed=seed))


def waves(plan: ViewPlan) -> Tensor:
    """A smooth function of the position in the image, (V, h, w, C)."""
    rows, columns = (torch.from_numpy(side).float() for side in plan.centres())
    y, x = rows[:, :, None], columns[:, None, :]
    return torch.stack([torch.sin(3 * x + y), torch.cos(4 * y - x), torch.sin(2 * x) * torch.cos(3 * y)], -1)


def planted_artifact() -> Tensor:
    """G (h, w, C) with mean zero."""
    artifact = noise(*GRID, CHANNELS, seed=9)
    return artifact - artifact.mean((0, 1))


def planted_views(views: int, seed: int = 0) -> SeenViews:
    plan = make_plan(views, seed)
    return SeenViews(plan, waves(plan) + planted_artifact())


def start(options: NeuralFieldOptions, seed: int = 0, artifact: Tensor | None = None) -> NeuralModel:
    """The model at the start of a fit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NeuralModel(math.prod(GRID), CHANNELS, options, None if artifact is None else artifact.flatten(0, 1))


def same_parameters(one: NeuralFit, other: NeuralFit) -> bool:
    first, second = one.model.state_dict(), other.model.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- the model ---


def test_coords_are_x_y_of_every_patch_in_view_order() -> None:
    views = noisy_views(5)
    coords = views.coords()
    rows, columns = views.plan.centres()
    h, w = GRID
    assert coords.shape == (5 * h * w, 2) and coords.dtype == torch.float32
    for view, y, x in ((0, 0, 0), (0, 4, 6), (3, 2, 5), (4, 1, 0)):
        there = coords[(view * h + y) * w + x].tolist()
        assert there == pytest.approx([columns[view, x], rows[view, y]], abs=1e-7)


def test_default_network_widths_follow_the_channels() -> None:
    published = NeuralModel(35, 22, tiny(field_hidden=None, residual_hidden=None))
    shapes = [tuple(layer.weight.shape) for layer in published.network if isinstance(layer, nn.Linear)]
    assert shapes == [(11, 6), (22, 11)]
    shapes = [tuple(layer.weight.shape) for layer in published.residual if isinstance(layer, nn.Linear)]
    assert shapes == [(5, 22), (5, 5), (22, 5)]
    assert published.artifact.shape == (35, 22)
    assert not published.artifact.detach().any()


def test_field_on_a_grid_equals_the_field_at_each_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("denoising_vit.decomposition.neural_field.model._CHUNK", 4)
    model = start(TINY)
    rows, columns = np.array([0.1, 0.9]), np.array([0.0, 0.3, 0.5, 0.7, 1.0])
    found = model.semantic_on(rows, columns)
    assert found.shape == (2, 5, CHANNELS)
    for i, y in enumerate(rows):
        for j, x in enumerate(columns):
            expected = model.semantic(torch.tensor([[x, y]], dtype=torch.float32))[0]
            torch.testing.assert_close(found[i, j], expected.detach())


# --- steps by hand ---


class AdamByHand:
    """Adam with weight decay added to the gradient; parameters without a gradient are not updated."""

    def __init__(self, options: NeuralFieldOptions) -> None:
        self.options = options
        self.state: dict[str, tuple[int, Tensor, Tensor]] = {}

    def step(self, parameters: dict[str, Tensor], gradients: dict[str, Tensor | None], rate: float) -> None:
        b1, b2 = self.options.beta1, self.options.beta2
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            parameter = parameters[name]
            gradient = gradient * (1024 if self.options.recipe == "released" else 1)
            gradient = gradient + self.options.weight_decay * parameter
            zeros = torch.zeros_like(parameter)
            count, mean, square = self.state.get(name, (0, zeros, zeros))
            count, mean, square = count + 1, b1 * mean + (1 - b1) * gradient, b2 * square + (1 - b2) * gradient**2
            self.state[name] = count, mean, square
            unbiased = (square / (1 - b2**count)).sqrt() + self.options.eps
            parameters[name] = parameter - rate * (mean / (1 - b1**count)) / unbiased


def loss_by_hand(
    parameters: dict[str, Tensor], model: NeuralModel, views: SeenViews, chosen: Tensor, options: NeuralFieldOptions,
    *, with_residual: bool,
) -> Tensor:  # fmt: skip
    """The loss of one step, written out from the parameters."""
    (h, w), p = GRID, parameters
    rows, columns = (torch.from_numpy(side).float() for side in views.plan.centres())
    view, position = chosen // (h * w), chosen % (h * w)
    y, x = position // w, position % w
    entries, weights = model.grid.corners(torch.stack([columns[view, x], rows[view, y]], -1))
    inside = (p["grid.table"][entries] * weights[..., None]).sum(2).flatten(1)
    hidden = (inside @ p["network.0.weight"].T + p["network.0.bias"]).relu()
    semantic = hidden @ p["network.2.weight"].T + p["network.2.bias"]
    artifact, features = p["artifact"][position], views.features[view, y, x]
    if not with_residual:
        predicted, target, more = semantic + artifact, features, torch.zeros(())
    else:
        first = (features @ p["residual.0.weight"].T + p["residual.0.bias"]).relu()
        second = (first @ p["residual.2.weight"].T + p["residual.2.bias"]).relu()
        residual = second @ p["residual.4.weight"].T + p["residual.4.bias"]
        predicted, target = semantic + artifact.detach(), features - residual.detach()
        if options.recipe == "released":
            predicted, target = predicted + residual.detach(), features
        left = (features - semantic - artifact).detach()
        more = options.residual_weight * (residual - left).square().mean()
        more = more + options.sparsity_weight * residual.abs().mean()
    cosine = (predicted * target).sum(-1) / (predicted.norm(dim=-1) * target.norm(dim=-1))
    return (predicted - target).square().mean() + 1 - cosine.mean() + more


RATES = {
    ("paper", 1): [1e-2],
    ("paper", 3): [1e-2, 1e-2, 1e-3],
    ("paper", 5): [1e-2, 1e-2, 7.75e-3, 3.25e-3, 1e-3],
    # Warm-up starts at 0, and the cosine would end at step 5, the sixth step.
    ("released", 5): [0, *(1e-3 + 9e-3 * (1 + math.cos(math.pi * share)) / 2 for share in (0, 0.25, 0.5, 0.75))],
}


@pytest.mark.parametrize(
    ("recipe", "steps", "residual_from", "first_with_residual"),
    [
        ("paper", 1, 0.5, 1),
        ("paper", 1, 0.0, 0),
        ("paper", 3, 1.0, 3),
        ("paper", 5, 0.5, 3),
        ("released", 5, 0.4, 3),  # it would be 2 with the paper recipe
        ("released", 5, 1.0, 6),
    ],
)
def test_whole_steps_equal_steps_by_hand(
    recipe: Any, steps: int, residual_from: float, first_with_residual: int
) -> None:
    # Without a large eps, Adam's first step depends only on the sign of the gradient.
    eps, decay = (10.0, 100.0) if recipe == "released" else (1e-2, 0.1)  # gradients are 1,024 times as large
    options = tiny(
        recipe=recipe, steps=steps, residual_from=residual_from, eps=eps, weight_decay=decay, warm_up=0.2, tokens=31
    )
    views, seed = noisy_views(), 4
    fit = fit_neural_field(views, options, seed=seed)

    model, adam, draw = start(options, seed), AdamByHand(options), torch.Generator().manual_seed(seed)
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss = torch.zeros(())
    for step, rate in enumerate(RATES[recipe, steps]):
        chosen = torch.randint(12 * math.prod(GRID), (31,), generator=draw)
        leaves = {name: parameter.clone().requires_grad_() for name, parameter in parameters.items()}
        with_residual = step >= first_with_residual
        loss = loss_by_hand(leaves, model, views, chosen, options, with_residual=with_residual)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        adam.step(parameters, dict(zip(leaves, gradients, strict=True)), rate)
    assert fit.history[-1].loss == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in fit.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), parameters[name], rtol=1e-4, atol=2e-6, msg=name)


def test_released_recipe_starts_from_a_small_random_artifact() -> None:
    model = NeuralModel(400, 24, tiny(recipe="released"))
    assert float(model.artifact.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert abs(float(model.artifact.detach().mean())) < 1e-3


def test_released_recipe_matches_the_released_code() -> None:
    options = DenoiseOptions.released()
    options.validate()
    neural = options.neural
    assert (options.views, options.coverage) == (769, "released")  # 768 crops and the whole photo
    assert (neural.total_steps, neural.first_with_residual) == (25_000, 12_501)
    rates = [learning_rate(step, neural) for step in (0, 1, 2499, 2500, 13_750)]
    assert rates == pytest.approx([0, 1e-2 / 2500, 1e-2 * 2499 / 2500, 1e-2, 5.5e-3])
    assert learning_rate(24_999, neural) > 1e-3
    assert NeuralFieldOptions().total_steps == 20_000
    assert NeuralFieldOptions(recipe="released", steps=30).total_steps == 30


# --- the learning rate ---


def test_learning_rate_rises_linearly_and_falls_along_a_cosine() -> None:
    options = NeuralFieldOptions(steps=101, warm_up=0.1)  # 10 steps of warm-up
    rates = [learning_rate(step, options) for step in range(101)]
    assert rates[:10] == pytest.approx([1e-3 * step for step in range(1, 11)])
    assert rates[10] == pytest.approx(1e-2)
    assert rates[55] == pytest.approx((1e-2 + 1e-3) / 2)  # midway between steps 10 and 100
    assert rates[-1] == pytest.approx(1e-3)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_learning_rate_without_warm_up_begins_at_the_full_rate() -> None:
    options = NeuralFieldOptions(steps=50, warm_up=0.0, learning_rate=0.3, final_learning_rate=0.0)
    assert learning_rate(0, options) == pytest.approx(0.3)
    assert learning_rate(49, options) == pytest.approx(0.0)


@pytest.mark.parametrize(("steps", "warm_up"), [(1, 0.0), (1, 1.0), (2, 0.5), (10, 1.0)])
def test_learning_rate_of_very_short_fits_stays_in_its_range(steps: int, warm_up: float) -> None:
    options = NeuralFieldOptions(steps=steps, warm_up=warm_up)
    assert all(0 < learning_rate(step, options) < 1.000001e-2 for step in range(steps))


# --- results of a fit ---


@pytest.fixture(scope="module")
def planted() -> NeuralFit:
    options = NeuralFieldOptions(
        steps=400, tokens=256, learning_rate=5e-2, levels=3, coarsest=4, finest=8, level_channels=4, field_hidden=64,
        residual_from=1.0, evaluate_every=100,
    )  # fmt: skip
    return fit_neural_field(planted_views(24), options, held_out=planted_views(6, seed=1))


def test_planted_field_and_artifact_predict_held_out_views(planted: NeuralFit) -> None:
    last = planted.history[-1]
    assert last.r2 is not None and last.cosine is not None
    assert last.r2 > 0.98
    assert last.cosine > 0.98
    assert last.loss < planted.history[0].loss


def test_planted_field_and_artifact_are_separated(planted: NeuralFit) -> None:
    field, artifact = planted.separate((3 * GRID[0], 3 * GRID[1]), (*GRID, CHANNELS))
    error = (artifact - planted_artifact()).norm() / planted_artifact().norm()
    assert error < 0.1
    clean = waves(make_plan(1))[0]  # the whole image
    assert (field[1::3, 1::3] - clean).norm() / clean.norm() < 0.1


def test_separate_centres_the_artifact_and_keeps_the_sum(planted: NeuralFit) -> None:
    (h, w), model = GRID, planted.model
    field, artifact = planted.separate((3 * h, 3 * w), (h, w, CHANNELS))
    assert field.shape == (3 * h, 3 * w, CHANNELS) and artifact.shape == (h, w, CHANNELS)
    assert not field.requires_grad and not artifact.requires_grad
    assert artifact.mean((0, 1)).abs().max() < 1e-6
    result = Decomposition(field, artifact, torch.zeros_like(artifact), (h * PATCH, w * PATCH), PATCH, PATCH)
    direct = model.semantic_on(patch_centres(h * PATCH, PATCH, PATCH), patch_centres(w * PATCH, PATCH, PATCH))
    expected = direct + model.artifact.view(h, w, CHANNELS)
    torch.testing.assert_close(result.semantic + result.artifact, expected, rtol=1e-4, atol=1e-5)
    assert model.artifact.mean(0).abs().max() > 1e-3  # there was a mean to move


def test_known_artifact_is_not_changed() -> None:
    known = planted_artifact() + 0.5  # its mean must not be moved either
    before = known.clone()
    fit = fit_neural_field(planted_views(12), TINY, artifact=known)
    field, artifact = fit.separate((15, 21), (*GRID, CHANNELS))
    assert torch.equal(known, before)
    assert torch.equal(artifact, before)
    assert torch.equal(fit.model.artifact, before.flatten(0, 1))
    rows, columns = patch_centres(15, 1, 1), patch_centres(21, 1, 1)
    assert torch.equal(field, fit.model.semantic_on(rows, columns))


def test_without_a_shared_artifact_the_artifact_is_zero() -> None:
    fit = fit_neural_field(planted_views(12), tiny(shared_artifact=False))
    assert not fit.separate((15, 21), (*GRID, CHANNELS))[1].any()
    assert "artifact" not in dict(fit.model.named_parameters())


def test_residual_from_1_fits_no_residual() -> None:
    options, views = tiny(residual_from=1.0), noisy_views()
    fit = fit_neural_field(views, options, held_out=noisy_views(3, seed=1))
    assert not fit.has_residual
    assert fit.predict_residual(views.features) is None
    assert {look.r2_with_residual for look in fit.history} == {None}
    before = start(options).residual.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in fit.model.residual.state_dict().items())


def test_residual_is_predicted_from_the_features() -> None:
    views = noisy_views()
    fit = fit_neural_field(views, TINY, held_out=noisy_views(3, seed=1))
    residual = fit.predict_residual(views.features)
    assert residual is not None
    assert residual.shape == views.features.shape and not residual.requires_grad
    assert torch.equal(residual[2, 3, 4], fit.model.residual(views.features)[2, 3, 4])
    known = [look.r2_with_residual is not None for look in fit.history]
    assert known == [False, False, True, True]  # steps 5, 10, 15, 20; the residual is fitted after step 10
    assert [look.cosine_with_residual is not None for look in fit.history] == known


def test_artifact_is_frozen_once_the_residual_is_fitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[dict[str, Tensor]] = []

    def spy(model: NeuralModel, *arguments: Any, **more: Any) -> Evaluation:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return evaluate(model, *arguments, **more)

    monkeypatch.setattr(loop, "evaluate", spy)
    fit_neural_field(noisy_views(), TINY)
    begin, (at5, at10, at15, at20) = start(TINY).state_dict(), seen
    assert not torch.equal(at5["artifact"], at10["artifact"])
    assert torch.equal(at10["artifact"], at15["artifact"]) and torch.equal(at15["artifact"], at20["artifact"])
    for name in (name for name in begin if name.startswith("residual")):
        assert torch.equal(begin[name], at5[name]) and torch.equal(at5[name], at10[name])
        assert not torch.equal(at10[name], at15[name])
    for name in ("grid.table", "network.0.weight", "network.2.bias"):  # the field is trained all the time
        assert all(not torch.equal(a[name], b[name]) for a, b in ((begin, at5), (at5, at10), (at10, at15)))


def test_evaluation_equals_r2_and_cosine_by_hand() -> None:
    held_out = noisy_views(3, seed=1)
    fit = fit_neural_field(noisy_views(), TINY, held_out=held_out)
    (h, w), truth = GRID, held_out.features
    semantic = fit.model.semantic(held_out.coords()).view(3, h, w, CHANNELS)
    alone = semantic + fit.model.artifact.view(h, w, CHANNELS)
    variation = (truth - truth.mean((0, 1, 2))).square().sum()
    for predicted, r2, cosine in (
        (alone, fit.history[-1].r2, fit.history[-1].cosine),
        (alone + fit.model.residual(truth), fit.history[-1].r2_with_residual, fit.history[-1].cosine_with_residual),
    ):
        assert r2 == pytest.approx(float(1 - (truth - predicted).square().sum() / variation), abs=1e-5)
        assert cosine == pytest.approx(float(torch.cosine_similarity(truth, predicted, dim=-1).mean()), abs=1e-5)


# --- reproducibility ---


def test_same_seed_is_bit_identical_and_another_is_not() -> None:
    views, held_out = noisy_views(), noisy_views(3, seed=1)
    torch.manual_seed(5)
    one = fit_neural_field(views, TINY, held_out=held_out, seed=3)
    torch.rand(7)  # draws from the global generator have no effect
    same = fit_neural_field(views, TINY, held_out=held_out, seed=3)
    other = fit_neural_field(views, TINY, held_out=held_out, seed=4)
    assert one.history == same.history
    assert same_parameters(one, same)
    assert one.history != other.history
    assert not same_parameters(one, other)


def test_global_random_state_is_unchanged() -> None:
    before = torch.get_rng_state()
    fit_neural_field(noisy_views(), tiny(steps=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_held_out_views_and_evaluations_do_not_change_the_fit() -> None:
    views = noisy_views()
    one = fit_neural_field(views, TINY, held_out=noisy_views(3, seed=1))
    assert same_parameters(one, fit_neural_field(views, TINY))
    assert same_parameters(one, fit_neural_field(views, tiny(evaluate_every=1)))


# --- which step is kept ---


def test_keep_best_returns_the_step_with_the_best_r2() -> None:
    views, held_out = noisy_views(4), noisy_views(6, seed=1)
    options = tiny(steps=100, evaluate_every=10, final_learning_rate=1e-2)
    last = fit_neural_field(views, options, held_out=held_out)
    best = fit_neural_field(views, dataclasses.replace(options, keep="best"), held_out=held_out)
    assert best.history == last.history
    assert best.step == best.best.step == max(last.history, key=lambda look: look.r2 or -math.inf).step
    assert best.step < last.step == 100  # the fit memorises noise, so the last step is not the best
    for fit, look in ((best, best.best), (last, last.history[-1])):
        again = evaluate(fit.model, held_out, look.step, look.loss, with_residual=fit.has_residual)
        assert again == look
        assert fit.has_residual == (fit.step > 50)


def test_fitted_model_requires_no_gradients() -> None:
    fit = fit_neural_field(noisy_views(), TINY)
    assert not any(parameter.requires_grad for parameter in fit.model.parameters())


def test_best_step_without_held_out_views_is_refused() -> None:
    with pytest.raises(PlanError, match=r"keep 'best' needs held-out views"):
        fit_neural_field(noisy_views(), tiny(keep="best"))


def test_bad_option_is_refused_by_the_fit() -> None:
    with pytest.raises(PlanError, match=r"tokens"):
        fit_neural_field(noisy_views(), tiny(tokens=0))


# --- history, progress and divergence ---


@pytest.mark.parametrize(
    ("steps", "every", "looks"),
    [(25, 10, [10, 20, 25]), (20, 10, [10, 20]), (3, 10, [3]), (3, 1, [1, 2, 3])],
)
def test_history_has_every_nth_step_and_the_last(steps: int, every: int, looks: list[int]) -> None:
    watched: list[Evaluation] = []
    fit = fit_neural_field(noisy_views(), tiny(steps=steps, evaluate_every=every), watch=watched.append)
    assert [look.step for look in fit.history] == looks
    assert watched == fit.history
    assert fit.step == steps
    assert {look.r2 for look in fit.history} == {look.cosine for look in fit.history} == {None}


def test_progress_is_reported_after_every_step() -> None:
    reported: list[int] = []
    fit_neural_field(noisy_views(), tiny(steps=7), progress=reported.append)
    assert reported == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(("steps", "every", "noticed"), [(9, 3, 3), (7, 50, 7), (130, 1000, 100)])
def test_non_finite_loss_raises_an_error_that_names_the_step(steps: int, every: int, noticed: int) -> None:
    views = noisy_views()
    broken = SeenViews(views.plan, torch.full_like(views.features, math.nan))
    with pytest.raises(FitError, match=rf"is nan by step {noticed};.*learning_rate"):
        fit_neural_field(broken, tiny(steps=steps, evaluate_every=every))


def test_far_too_high_learning_rate_raises_an_error() -> None:
    with pytest.raises(FitError, match=r"by step \d+"):
        fit_neural_field(noisy_views(), tiny(learning_rate=1e25, steps=40))


# --- the options ---


def test_defaults_and_extremes_are_accepted() -> None:
    NeuralFieldOptions().validate()
    tiny(warm_up=0.0, residual_from=0.0, final_learning_rate=0.0, weight_decay=0.0, beta1=0.0, beta2=0.0).validate()
    tiny(warm_up=1.0, residual_from=1.0, levels=1, coarsest=2, finest=2, steps=1, tokens=1, keep="best").validate()


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *((name, 0, r"must be at least 1, got 0") for name in ("steps", "tokens", "levels", "level_channels")),
        *((name, -3, r"must be at least 1, got -3") for name in ("table_size", "evaluate_every", "field_hidden")),
        ("residual_hidden", 0, r"must be at least 1, got 0"),
        *(("learning_rate", value, rf"must be a positive number, got {value}") for value in (0.0, -1.0, NAN, INF)),
        *(("eps", value, rf"must be a positive number, got {value}") for value in (0.0, -1e-3, NAN)),
        *(
            (name, value, rf"must be at least 0, got {value}")
            for name in ("weight_decay", "residual_weight", "sparsity_weight", "final_learning_rate")
            for value in (-0.5, NAN, INF)
        ),
        *(
            (name, value, rf"must be a fraction in \[0, 1\], got {value}")
            for name in ("warm_up", "residual_from")
            for value in (-0.1, 1.5, NAN)
        ),
        *((name, value, rf"must be in \[0, 1\), got {value}") for name in ("beta1", "beta2") for value in (-0.1, 1.0)),
        ("coarsest", 1, r"must be at least 2 and at most finest, got 1 and 8"),
        ("coarsest", 9, r"must be at least 2 and at most finest, got 9 and 8"),
        ("recipe", "published", r"must be 'paper' or 'released', got 'published'"),
        ("keep", "first", r"must be 'last' or 'best', got 'first'"),
    ],
)
def test_invalid_option_is_named_in_the_error(name: str, value: Any, message: str) -> None:
    with pytest.raises(PlanError, match=rf"{name} {message}"):
        tiny(**{name: value}).validate()


def test_finest_below_coarsest_is_refused() -> None:
    with pytest.raises(PlanError, match=r"at most finest, got 2 and 1"):
        tiny(finest=1).validate()


# --- stage 1 of a photo ---

SIDE, WIDTH = 56, 5  # a grid of 7 x 7


def neurally(**changes: Any) -> dict[str, Any]:
    """Options of a very short fit."""
    few = {"method": "neural-field", "views": 6, "held_out": 3, "neural": TINY}
    return few | changes


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """One convolution with a kernel of the size of a patch."""
    torch.manual_seed(0)
    return dv.load_backbone(nn.Conv2d(3, WIDTH, PATCH, PATCH), patch_size=PATCH, default_size=SIDE)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """(100, 150, 3)."""
    return np.array(Image.fromarray(data.chelsea()).resize((150, 100)))


@pytest.fixture(scope="module")
def result(backbone: Backbone, photo: np.ndarray) -> Decomposition:
    return dv.denoise_image(backbone, photo, **neurally())


def test_shapes_and_types_of_a_result(result: Decomposition) -> None:
    parts = (result.semantic, result.artifact, result.raw, result.residual)
    assert {tuple(part.shape) for part in parts} == {(7, 7, WIDTH)}
    assert result.field.shape == (21, 21, WIDTH)  # three nodes per patch, so that patch centres are nodes
    for part in (*parts, result.field):
        assert part.dtype == torch.float32 and part.device.type == "cpu"
        assert torch.isfinite(part).all() and not part.requires_grad
    assert torch.allclose(result.semantic, result.field[1::3, 1::3], atol=1e-5)
    assert result.artifact.mean((0, 1)).abs().max() < 1e-6


def test_residual_is_the_predicted_one_and_survives_saving(result: Decomposition, tmp_path: Path) -> None:
    assert result.predicted_residual is not None
    assert torch.equal(result.residual, result.predicted_residual)
    assert not torch.allclose(result.residual, result.raw - result.semantic - result.artifact, atol=1e-3)
    result.save(tmp_path / "result.safetensors")
    assert set(load_file(tmp_path / "result.safetensors")) == {"field", "semantic", "artifact", "raw", "residual"}
    loaded = Decomposition.load(tmp_path / "result.safetensors")
    for name in ("predicted_residual", "residual", "semantic", "artifact", "raw"):
        expected = getattr(result, name)
        tolerance = 1e-3 * float(expected.abs().max())
        torch.testing.assert_close(getattr(loaded, name), expected, rtol=1e-3, atol=tolerance)
    assert loaded.info == json.loads(json.dumps(result.info))


def test_without_a_fitted_residual_the_residual_is_the_remainder(
    backbone: Backbone, photo: np.ndarray, tmp_path: Path
) -> None:
    result = dv.denoise_image(backbone, photo, **neurally(neural=tiny(residual_from=1.0)))
    assert result.predicted_residual is None
    assert torch.equal(result.residual, result.raw - result.semantic - result.artifact)
    result.save(tmp_path / "result.safetensors")
    assert Decomposition.load(tmp_path / "result.safetensors").predicted_residual is None


def test_info_records_the_recipe_and_the_history(result: Decomposition) -> None:
    info = json.loads(json.dumps(result.info, allow_nan=False))
    assert info["method"] == "neural-field"
    assert info["neural"] == dataclasses.asdict(TINY)
    assert info["step"] == 20
    assert [look["step"] for look in info["history"]] == [5, 10, 15, 20]
    assert set(info["history"][0]) == {field.name for field in dataclasses.fields(Evaluation)}
    assert info["heldout_r2"] == result.heldout_r2 == info["history"][-1]["r2"]
    assert info["heldout_cosine"] == info["history"][-1]["cosine"]
    assert not set(info) & {"smoothness", "shrinkage", "clip", "taper", "clipped_tokens"}
    assert set(info) >= {
        "version",
        "photo",
        "backbone",
        "plan",
        "views",
        "held_out",
        "seed",
        "artifact",
        "seconds",
    }


def test_info_of_exact_results_has_no_neural_field_entries(backbone: Backbone, photo: np.ndarray) -> None:
    result = dv.denoise_image(backbone, photo, views=12, held_out=3)
    assert not set(result.info) & {"neural", "step", "history"}
    assert set(result.info) >= {"smoothness", "shrinkage", "clip", "taper"}
    assert result.predicted_residual is None


def test_same_seed_gives_the_same_result_and_another_does_not(
    backbone: Backbone, photo: np.ndarray, result: Decomposition
) -> None:
    again = dv.denoise_image(backbone, photo, **neurally())
    for name in ("field", "artifact", "raw", "residual"):
        assert torch.equal(getattr(again, name), getattr(result, name)), name
    assert again.info["history"] == result.info["history"]
    assert not torch.equal(dv.denoise_image(backbone, photo, **neurally(seed=1)).field, result.field)


def test_info_is_of_the_best_step_with_keep_best(backbone: Backbone, photo: np.ndarray) -> None:
    info = dv.denoise_image(backbone, photo, **neurally(neural=tiny(keep="best"))).info
    best = max(info["history"], key=lambda look: look["r2"])
    assert (info["step"], info["heldout_r2"], info["heldout_cosine"]) == (best["step"], best["r2"], best["cosine"])


def test_non_square_size(backbone: Backbone, photo: np.ndarray) -> None:
    result = dv.denoise_image(backbone, photo, **neurally(size=(40, 72)))
    assert result.semantic.shape == result.artifact.shape == result.residual.shape == (5, 9, WIDTH)
    assert result.field.shape == (15, 27, WIDTH)
    json.dumps(result.info, allow_nan=False)


def test_released_semantic_is_the_field_at_the_fitted_points(backbone: Backbone, photo: np.ndarray) -> None:
    """The released code places the patches of the whole photo from edge to edge."""
    options = neurally(coverage="released", neural=tiny(recipe="released"))
    result = dv.denoise_image(backbone, photo, **options)
    fitted, _ = prepare(backbone, DenoiseOptions(**options))
    image = to_image(photo)
    seen = gather(extract_views(backbone, image, fitted), fitted)
    assert seen.features.dtype == torch.float32
    fit = fit_neural_field(seen, tiny(recipe="released"), seed=0)
    places = np.linspace(0, 1, 7)
    mean = fit.model.artifact.mean(0)
    torch.testing.assert_close(result.semantic, fit.model.semantic_on(places, places) + mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(result.raw, seen.features[0])


def test_known_artifact_is_used_unchanged(backbone: Backbone, photo: np.ndarray) -> None:
    known = noise(7, 7, WIDTH).requires_grad_()
    result = dv.denoise_image(backbone, photo, artifact=known, **neurally())
    assert torch.equal(result.artifact, known.detach())
    assert known.grad is None and not result.artifact.requires_grad
    assert len(result.info["artifact"]) == 64


def test_without_held_out_views_there_are_no_held_out_metrics(
    backbone: Backbone, photo: np.ndarray, result: Decomposition
) -> None:
    alone = dv.denoise_image(backbone, photo, **neurally(held_out=0))
    assert alone.heldout_r2 is None and alone.heldout_cosine is None
    assert torch.equal(alone.field, result.field)


def test_progress_counts_views_and_steps_and_watch_gets_evaluations(backbone: Backbone, photo: np.ndarray) -> None:
    calls: list[tuple[int, int]] = []
    looks: list[Evaluation] = []
    record = lambda done, total: calls.append((done, total))  # noqa: E731
    result = dv.denoise_image(backbone, photo, batch_size=2, progress=record, watch=looks.append, **neurally())
    assert work(DenoiseOptions(**neurally())) == 29  # 6 + 3 views and 20 steps
    done, totals = zip(*calls, strict=True)
    assert set(totals) == {29}
    assert done == (0, 2, 4, 6, 8, *range(9, 30))
    assert [dataclasses.asdict(look) for look in looks] == result.info["history"]


def test_denoise_image_refuses_keep_best_without_held_out_views(backbone: Backbone, photo: np.ndarray) -> None:
    with pytest.raises(PlanError, match=r"keep 'best' needs .*held_out must be at least 1"):
        dv.denoise_image(backbone, photo, **neurally(held_out=0, neural=tiny(keep="best")))


def test_unknown_method_error_lists_all_methods(backbone: Backbone, photo: np.ndarray) -> None:
    named = "exact, neural-field, subtract, denoiser, .*auto"
    with pytest.raises(PlanError, match=f"unknown method 'magic'; choose from {named}"):
        dv.denoise_image(backbone, photo, method="magic")


def test_neural_options_are_validated_only_if_used(backbone: Backbone, photo: np.ndarray) -> None:
    bad = tiny(steps=0)
    DenoiseOptions(neural=bad).validate()
    with pytest.raises(PlanError, match=r"steps must be at least 1, got 0"):
        dv.denoise_image(backbone, photo, **neurally(neural=bad))


def test_features_are_stored_in_half_precision_if_they_fit() -> None:
    small, large = noise(2, *GRID, CHANNELS), 1e5 * torch.ones(1, *GRID, CHANNELS)
    half = gather(iter([small]), make_plan(2)).features
    assert half.dtype == torch.float16
    assert torch.equal(half, small.half())
    both = gather(iter([small, large]), make_plan(3)).features
    assert both.dtype == torch.float32
    assert torch.equal(both[2], large[0])


def test_non_finite_features_are_refused() -> None:
    with pytest.raises(BackboneError, match="not finite"):
        gather(iter([torch.full((2, *GRID, CHANNELS), math.inf)]), make_plan(2))


# --- the command line ---


def of_recipe(name: str, value: object) -> list[str]:
    """A recipe option as typed on the command line."""
    return [f"--{name}", str(value)]


def test_command_line_keeps_results_and_notes_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw_dot(_photo: np.ndarray, _result: Decomposition, path: Path, **_options: Any) -> None:
        Image.new("RGB", (1, 1)).save(path, format="PNG")

    monkeypatch.setattr(denoising_vit.maps, "draw_panel", draw_dot)
    photo, out = tmp_path / "one.png", tmp_path / "out"
    Image.fromarray(data.chelsea()).resize((90, 60)).save(photo)

    def dvit(*more: str) -> dict[str, Any]:
        fast = ["--weights", "random", "--backbone", "vit_tiny_patch16_224", "--size", "96", "--views", "6"]
        recipe = [*of_recipe("steps", 20), *of_recipe("tokens", 64), *of_recipe("finest", 32)]
        few = ["--held-out", "2", "--dtype", "float32", "--device", "cpu", "--method", "neural-field"]
        arguments = [*fast, *few, *recipe, *more, "--json"]
        capsys.readouterr()
        assert app.run(["denoise", str(photo), "-o", str(out), *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    done = dvit()
    assert done["status"] == "done" and done["heldout_r2"] <= 1
    path = out / "one.safetensors"
    before, info = path.read_bytes(), Decomposition.load(path).info
    assert (info["method"], info["step"]) == ("neural-field", 20)
    assert (info["neural"]["steps"], info["neural"]["tokens"], info["neural"]["finest"]) == (20, 64, 32)

    def never(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("this must not be called")

    monkeypatch.setattr(verb.Denoising, "__call__", never)
    kept = dvit()
    assert (kept["status"], kept["note"], kept["heldout_r2"]) == ("kept", "kept", done["heldout_r2"])
    for other in (of_recipe("steps", 21), ["--method", "exact"]):
        again = dvit(*other)
        assert again["status"] == "kept" and re.search("other settings.*--overwrite", again["note"]), other
    assert path.read_bytes() == before
