"""The training loop of the neural field: stage 1 as published."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.backbones.runtime import seeded
from denoising_vit.decomposition.neural_field.model import NeuralModel, first_phase_loss, second_phase_loss
from denoising_vit.decomposition.options import NeuralFieldOptions
from denoising_vit.decomposition.statistics import Agreement
from denoising_vit.errors import FitError, PlanError
from denoising_vit.views.plan import ViewPlan

#: Number of steps between checks of the loss for NaN, because reading it waits for the device.
_CHECK_EVERY = 100

#: Factor on the loss in the released recipe, which never divides its gradient by it again.
_RELEASED_SCALE = 1024


@dataclass(frozen=True)
class Evaluation:
    """An evaluation on the held-out views.

    Attributes:
        step: number of completed steps.
        loss: loss of the last step.
        r2: fraction of the variance explained by F + G; None without held-out views.
        cosine: mean cosine between F + G and the features.
        r2_with_residual: R^2 of F + G + h, if h is fitted. Note that h sees the features that it predicts.
        cosine_with_residual: cosine of F + G + h, if h is fitted.
    """

    step: int
    loss: float
    r2: float | None = None
    cosine: float | None = None
    r2_with_residual: float | None = None
    cosine_with_residual: float | None = None


@dataclass
class NeuralFit:
    """The fitted model and its history.

    Attributes:
        plan: the fitted views.
        model: the model after the last or the best step, according to the options.
        step: number of this step.
        has_residual: True if h was fitted by this step.
        history: evaluations at regular steps.
    """

    plan: ViewPlan
    model: NeuralModel
    step: int
    has_residual: bool
    history: list[Evaluation] = field(default_factory=list)

    @property
    def best(self) -> Evaluation:
        """The evaluation with the highest R^2 of F + G; the last if none has an R^2."""
        return max(reversed(self.history), key=lambda evaluation: -math.inf if evaluation.r2 is None else evaluation.r2)

    def separate(self, resolution: tuple[int, int], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """F on nodes at cell centres (Ry, Rx, C), and G as (h, w, C) with mean zero, as from the exact solver.

        The mean of G is moved to F, so that their sum is unchanged.
        """
        rows, columns = self.plan.coords_of_nodes(resolution)
        artifact = self.model.artifact.detach()
        mean = artifact.mean(0) if self.model.fits_artifact else torch.zeros_like(artifact[0])
        return self.model.semantic_on(rows, columns) + mean, (artifact - mean).view(shape)

    @torch.no_grad()
    def predict_residual(self, features: Tensor) -> Tensor | None:
        """Predicted h for features (..., C); None if it was not fitted."""
        return self.model.residual(features) if self.has_residual else None


@dataclass(frozen=True)
class SeenViews:
    """Features (V, h, w, C) of the views of a plan."""

    plan: ViewPlan
    features: Tensor

    def coords(self) -> Tensor:
        """(x, y) in the image of every patch, (V h w, 2) float32."""
        rows, columns = (torch.from_numpy(side).float() for side in self.plan.centres())  # (V, h), (V, w)
        shape = (*rows.shape, columns.shape[1])
        coords = torch.stack([columns[:, None, :].expand(shape), rows[:, :, None].expand(shape)], -1)
        return coords.flatten(0, 2)  # (V, h, w, 2) -> (V h w, 2)


def fit_neural_field(
    views: SeenViews,
    options: NeuralFieldOptions,
    *,
    held_out: SeenViews | None = None,
    artifact: Tensor | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    watch: Callable[[Evaluation], None] | None = None,
) -> NeuralFit:
    """Fit F, G and h of one image to the features of its views with Adam (section 4.1 of the paper).

    Args:
        views: the views to fit; the fit runs on the features' device.
        options: the recipe.
        held_out: views for evaluation only.
        artifact: G (h, w, C), if known.
        seed: seed for the initial values and the drawn tokens; the same seed on the same machine gives the same result.
        progress: called after each step with the number of completed steps.
        watch: called with every evaluation.

    Raises:
        PlanError: if an option is out of range, or the best step is requested without held-out views.
        FitError: if the loss is not finite.
    """
    options.validate()
    if options.keep == "best" and held_out is None:
        raise PlanError("keep 'best' needs held-out views, got none")
    device, (positions, channels) = views.features.device, views.features.flatten(1, 2).shape[1:]
    with seeded(seed):  # initial values are drawn on the CPU, so that they are the same for every device
        known = None if artifact is None else artifact.flatten(0, 1)
        model = NeuralModel(positions, channels, options, known).to(device)
    draw = torch.Generator(device).manual_seed(seed)
    features, coords = views.features.flatten(0, 2), views.coords().to(device)
    optimizer = torch.optim.Adam(
        model.parameters(),
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
    steps, first_with_residual = options.total_steps, options.first_with_residual
    scale = _RELEASED_SCALE if options.recipe == "released" else 1
    fit = NeuralFit(views.plan, model, steps, has_residual=first_with_residual < steps)
    best: dict[str, Tensor] | None = None
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        chosen = torch.randint(len(features), (options.tokens,), generator=draw, device=device)
        target = features[chosen].float()
        semantic = model.semantic(coords[chosen])
        shared = F.embedding(chosen % positions, model.artifact)  # patches are ordered by view, then by position
        with_residual = step >= first_with_residual
        if with_residual:
            weights = options.residual_weight, options.sparsity_weight
            loss = second_phase_loss(semantic, shared, model.residual(target), target, *weights, options.recipe)
        else:
            loss = first_phase_loss(semantic, shared, target)
        optimizer.zero_grad()
        (scale * loss).backward()
        model.grid.densify_gradient()
        optimizer.step()  # parameters without a gradient (h at first, G later) are skipped

        done = step + 1
        look = done % options.evaluate_every == 0 or done == steps
        if look or done % _CHECK_EVERY == 0:
            _require_finite(loss.item(), done)
        if look:
            evaluation = evaluate(model, held_out, done, loss.item(), with_residual=with_residual)
            fit.history.append(evaluation)
            if options.keep == "best" and fit.best is evaluation:
                best = copy.deepcopy(model.state_dict())
                fit.step, fit.has_residual = done, with_residual
            if watch is not None:
                watch(evaluation)
        if progress is not None:
            progress(done)
    if best is not None:
        model.load_state_dict(best)
    model.requires_grad_(False)
    return fit


def learning_rate(step: int, options: NeuralFieldOptions) -> float:
    """Linear warm-up, then a cosine from the full learning rate to the final one at the last step.

    A warm-up that leaves at most one step ends at the full learning rate. In the released recipe, the first step has a
    learning rate of 0, and the cosine would end one step after the last.
    """
    warm_up, released = round(options.warm_up * options.total_steps), options.recipe == "released"
    if step < warm_up:
        return options.learning_rate * (step if released else step + 1) / warm_up
    share = (step - warm_up) / max(options.total_steps - (0 if released else 1) - warm_up, 1)
    fall = (1 + math.cos(math.pi * share)) / 2
    return options.final_learning_rate + (options.learning_rate - options.final_learning_rate) * fall


@torch.no_grad()
def evaluate(
    model: NeuralModel, held_out: SeenViews | None, step: int, loss: float, *, with_residual: bool
) -> Evaluation:
    """Evaluate the model on held-out views."""
    if held_out is None:
        return Evaluation(step, loss)
    alone, together = Agreement(), Agreement()
    h, w = held_out.plan.grid
    rows, columns = held_out.plan.centres()
    for view, truth in enumerate(held_out.features):
        truth = truth.float()
        predicted = model.semantic_on(rows[view], columns[view]) + model.artifact.view(h, w, -1)
        alone.add(truth, predicted)
        if with_residual:
            together.add(truth, predicted + model.residual(truth))
    return Evaluation(step, loss, alone.r2, alone.cosine, together.r2, together.cosine)


def _require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise FitError(
            f"the loss of the neural field is {loss} by step {step}; use a lower learning rate "
            "(learning_rate), or check the features for extreme values"
        )
