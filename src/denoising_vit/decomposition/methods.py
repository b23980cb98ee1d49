"""The methods of stage 1 for one photo: from views to field, artifact and residual."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.decomposition.inputs import extract_views, solver_for
from denoising_vit.decomposition.neural_field.fit import Evaluation, SeenViews, fit_neural_field
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.decomposition.stage_one import Ready
from denoising_vit.decomposition.statistics import Statistics, require_finite
from denoising_vit.views.plan import ViewPlan

#: Held-out metrics to record if no views are held out.
UNJUDGED: dict[str, float | None] = {"heldout_r2": None, "heldout_cosine": None}


@dataclass(frozen=True)
class Job:
    """One photo (3, H, W) in [0, 1], its views, and the options.

    The first of the fitted views shows the whole photo. ``on_done`` is called with the number of views or steps just
    completed.
    """

    backbone: Backbone
    image: Tensor
    fitted: ViewPlan
    held_out: ViewPlan | None
    options: DenoiseOptions
    on_done: Callable[[int], None]

    def features(self, plan: ViewPlan) -> Iterator[Tensor]:
        """Features of the views of a plan, batch by batch, (B, h, w, C) each."""
        for features in extract_views(self.backbone, self.image, plan, self.options.batch_size):
            yield features
            self.on_done(len(features))


@dataclass(frozen=True)
class Parts:
    """The result of a method.

    Attributes:
        field: F on its nodes (Ry, Rx, C).
        artifact: G (h, w, C).
        raw: the backbone's output for the whole photo, (h, w, C).
        residual: h as predicted by a model (h, w, C); None if it is the remainder after F and G.
        info: metrics and settings of the method, as JSON values.
    """

    field: Tensor
    artifact: Tensor
    raw: Tensor
    residual: Tensor | None
    info: dict[str, Any]


def separate_exactly(job: Job, artifact: Tensor | None) -> Parts:
    """Exact linear least squares: features are summed as they arrive, and not stored."""
    statistics = Statistics(job.fitted, job.backbone.embed_dim, device=job.backbone.device, clip=job.options.clip)
    solver = solver_for(job.fitted, job.options, job.backbone.device)
    photo = Ready(0, {}, statistics, solver, job.held_out, artifact)
    for fitted, plan in ((True, job.fitted), (False, job.held_out)):
        for features in () if plan is None else job.features(plan):
            photo.add(features, fitted=fitted)
    field, shared = photo.solve()
    assert photo.raw is not None
    return Parts(field, shared, photo.raw, None, UNJUDGED | photo.figures(field, shared))


def separate_neurally(job: Job, artifact: Tensor | None, watch: Callable[[Evaluation], None] | None) -> Parts:
    """Gradient descent as published; it stores the features of all views."""
    seen = gather(job.features(job.fitted), job.fitted)
    held_out = None if job.held_out is None else gather(job.features(job.held_out), job.held_out)
    options = job.options.neural
    fit = fit_neural_field(
        seen,
        options,
        held_out=held_out,
        artifact=artifact,
        seed=job.options.seed,
        progress=lambda _: job.on_done(1),
        watch=watch,
    )
    raw = seen.features[0].float()
    kept = next(look for look in fit.history if look.step == fit.step)
    info = {
        "heldout_r2": kept.r2,
        "heldout_cosine": kept.cosine,
        "step": fit.step,
        "history": [asdict(look) for look in fit.history],
    }
    field, shared = fit.separate(job.fitted.resolution, tuple(raw.shape))
    return Parts(field, shared, raw, fit.predict_residual(raw), info)


def gather(features: Iterator[Tensor], plan: ViewPlan) -> SeenViews:
    """Collect the features of all views of a plan, in float16 if within its range: 0.8 GB for 768 views.

    Features of a released plan keep their precision.

    Raises:
        BackboneError: if a value is not finite.
    """
    batches = []
    for batch in features:
        require_finite(batch)
        fits = float(batch.abs().max()) < torch.finfo(torch.float16).max
        batches.append(batch.half() if fits and not plan.released else batch)
    return SeenViews(plan, torch.cat(batches))
