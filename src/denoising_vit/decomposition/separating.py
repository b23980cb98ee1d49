"""The methods by which one photo's features are separated, from its views to field, artifact and residual."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.decomposition.extraction import extract_views
from denoising_vit.decomposition.heldout import HeldOut
from denoising_vit.decomposition.neural_field.fit import Evaluation, SeenViews, fit_neural_field
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.decomposition.preparing import solver_for
from denoising_vit.decomposition.statistics import Statistics, require_finite
from denoising_vit.views.plan import ViewPlan


@dataclass(frozen=True)
class Job:
    """One photo, its views, and how to run.

    Attributes:
        backbone: the extractor.
        image: (3, H, W) in [0, 1].
        fitted: views that are fitted; the first shows the whole photo.
        held_out: views that are judged by, if there are any.
        options: how to run.
        on_done: called with how many views or steps were done.
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
    """What a method found.

    Attributes:
        field: F on its nodes (Ry, Rx, C).
        artifact: G (h, w, C).
        raw: the backbone's output for the whole photo, (h, w, C).
        residual: h as a model predicts it (h, w, C); None where it is what is left over.
        info: figures and settings of the method, as JSON values.
    """

    field: Tensor
    artifact: Tensor
    raw: Tensor
    residual: Tensor | None
    info: dict[str, Any]


def separate_exactly(job: Job, artifact: Tensor | None) -> Parts:
    """Linear least squares: features enter sums as they come, and are not kept."""
    options = job.options
    solver = solver_for(job.fitted, options, job.backbone.device)
    statistics = Statistics(job.fitted, job.backbone.embed_dim, device=job.backbone.device, clip=options.clip)
    views = job.features(job.fitted)
    first = next(views)
    for features in itertools.chain([first], views):
        statistics.add(features)
    if artifact is None:
        field, artifact = solver.solve(statistics.b, statistics.g)
    else:
        artifact = artifact.to(statistics.b)
        field = solver.solve_field(statistics.b, artifact)
    info = {**_judge(job, field, artifact), "clipped_tokens": statistics.clipped_tokens}
    return Parts(field, artifact, first[0], None, info)  # view 0 is the full image


def _judge(job: Job, field: Tensor, artifact: Tensor) -> dict[str, float | None]:
    """Held-out figures; None where no views are held out."""
    if job.held_out is None:
        return {"heldout_r2": None, "heldout_cosine": None}
    judge = HeldOut(field, artifact, job.held_out)
    for features in job.features(job.held_out):
        judge.add_views(features)
    return {"heldout_r2": judge.r2, "heldout_cosine": judge.cosine}


def separate_neurally(job: Job, artifact: Tensor | None, watch: Callable[[Evaluation], None] | None) -> Parts:
    """Gradient descent as published: all features are kept for as long as it lasts."""
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
    """Keeps the features of all views of a plan, in float16 where they fit: those of 768 views take 0.8 GB.

    Those of a released plan are kept as they are.

    Raises:
        BackboneError: if a value is not finite.
    """
    batches = []
    for batch in features:
        require_finite(batch)
        fits = float(batch.abs().max()) < torch.finfo(torch.float16).max
        batches.append(batch.half() if fits and not plan.released else batch)
    return SeenViews(plan, torch.cat(batches))
