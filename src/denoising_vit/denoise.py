"""One photo: render views, run the backbone over them, separate what they agree on; or denoise it in one pass."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from denoising_vit.artifact import SHIPPED, KnownArtifact, artifact_digest, known_artifact
from denoising_vit.backbones import Backbone
from denoising_vit.decomposition import Decomposition, ExactSolver, Statistics
from denoising_vit.decomposition.heldout import HeldOut
from denoising_vit.decomposition.neural_field import Evaluation, SeenViews, fit_neural_field
from denoising_vit.decomposition.statistics import require_finite
from denoising_vit.denoiser.loading import (
    FoundDenoiser,
    GivenDenoiser,
    find_denoiser,
    find_shipped,
    source_name,
)
from denoising_vit.errors import PlanError
from denoising_vit.extraction import Photo, extract_views, load_image
from denoising_vit.options import ONE_PASS, DenoiseOptions
from denoising_vit.sampling import on_nodes
from denoising_vit.views import CropOptions, ViewPlan

Progress = Callable[[int, int], None]

#: Added to the seed for the views that are left out of the fit, so that they are others than the fitted ones.
_HELD_OUT_SEED = 1_000_003


def denoise_image(
    backbone: Backbone,
    photo: Photo,
    *,
    artifact: KnownArtifact | None = None,
    denoiser: GivenDenoiser | None = None,
    progress: Progress | None = None,
    watch: Callable[[Evaluation], None] | None = None,
    options: DenoiseOptions | None = None,
    **changes: Any,
) -> Decomposition:
    """Separates a photo's features into semantic field, shared artifact and residual (the paper's per-image denoising).

    With ``method="denoiser"`` one pass over the whole photo is mapped to the semantic field (stage 2). A denoiser does
    not tell the artifact from what else it removes: the artifact is zero then, and all of it is in the residual.

    Args:
        backbone: from :func:`~denoising_vit.load_backbone`.
        photo: a path, a PIL image, an (H, W, 3) uint8 array, or a normalised (1, 3, H, W) tensor.
        artifact: the backbone's artifact where it is known: an :class:`~denoising_vit.Artifact`, a file of one,
            ``"shipped"``, or values (h, w, C); then only the field is fitted.
        denoiser: the backbone's denoiser: a :class:`~denoising_vit.Denoiser`, or what
            :func:`~denoising_vit.load_denoiser` takes; only with the methods ``denoiser`` and ``auto``, which take the
            one that comes with the package where none is given.
        progress: called as ``progress(done, total)`` after each batch of views; with the neural field, after each step
            as well: ``total`` is :func:`work`.
        watch: called with every look that the neural field takes at the held-out views.
        options: how to run; the defaults where none.
        **changes: single fields of :class:`DenoiseOptions`, such as ``views=128``.

    Returns:
        The decomposition on the patch grid of ``size``, on the CPU.

    Raises:
        PhotoError: if the photo cannot be read or used.
        SizeError: if the size does not fit the patch grid.
        PlanError: if the views are too few, an option is out of range, or the method does not use what is given.
        BackboneError: if the features are not finite or not a grid.
        FitError: if the neural field's loss is not finite.
        ArtifactError: if the artifact is that of another backbone, or the method needs one and none is given.
        DenoiserError: if the denoiser is for another backbone, or the method needs one and none is given or found.
        FormatError: if the file of the artifact or the denoiser is missing, damaged or something else.
    """
    started = time.perf_counter()
    options, found = settle(replace(options or DenoiseOptions(), **changes), backbone, denoiser, artifact)
    if found is not None and artifact is not None:
        raise PlanError("an artifact is given, which the method 'denoiser' does not use; leave it out")
    image, about = load_image(photo, backbone)
    if isinstance(photo, Tensor) and options.size is None:
        options = replace(options, size=tuple(photo.shape[2:]))  # its owner has prepared it: it is shown as it is
    # Fails before the forward passes, not after them, where views are too few or the size is off the grid.
    known = given_artifact(artifact, backbone, options)
    fitted, held_out = prepare(backbone, options, known)
    job = _Job(backbone, image, fitted, held_out, options, _Reporter(progress, work(options)))
    if options.method == "exact":
        parts = _separate_exactly(job, known)
    elif options.method == "neural-field":
        parts = _separate_neurally(job, known, watch)
    elif found is not None:
        parts = _map_to_clean(job, found)
    else:
        parts = _subtract(job, known)
    return Decomposition(
        field=parts.field.float().cpu(),
        artifact=parts.artifact.float().cpu(),
        raw=parts.raw.float().cpu(),
        size=fitted.size,
        patch_size=backbone.patch_size,
        stride=backbone.stride,
        predicted_residual=None if parts.residual is None else parts.residual.float().cpu(),
        info={
            "version": importlib.metadata.version("denoising-vit"),
            "photo": about,
            "backbone": describe(backbone),
            "plan": fitted.digest,
            **options.recorded(),
            **parts.info,
            "artifact": artifact_digest(known),  # None where it was fitted, or there is none
            "seconds": round(time.perf_counter() - started, 3),
        },
    )


def settle(
    options: DenoiseOptions,
    backbone: Backbone,
    denoiser: GivenDenoiser | None = None,
    artifact: KnownArtifact | None = None,
) -> tuple[DenoiseOptions, FoundDenoiser | None]:
    """The options with the method that is run, and the denoiser where that uses one.

    ``auto`` is denoiser where one is given, exact where an artifact is given, which only stage 1 uses, and otherwise
    denoiser where one comes with the package for this backbone with these weights, layer and stride, else exact.

    Raises:
        PlanError: if a denoiser is given for a method that uses none, or an option is out of range.
        DenoiserError: if the denoiser is for another backbone, or cannot be found or fetched.
        FormatError: if the denoiser's file is damaged or something else.
    """
    options.validate()
    if options.method not in ("auto", "denoiser"):
        if denoiser is not None:
            raise PlanError(
                f"a denoiser ({source_name(denoiser)}) is given, but the method is {options.method!r}, which uses none"
                ": leave one of them out"
            )
        return options, None
    if options.method == "denoiser" or denoiser is not None:
        found = find_denoiser(denoiser, backbone)
    else:
        found = find_shipped(backbone) if artifact is None else None
    return replace(options, method="exact" if found is None else "denoiser"), found


def work(options: DenoiseOptions) -> int:
    """What progress on one photo counts up to: views, and the steps of the neural field."""
    if options.method in ONE_PASS:
        return 1
    steps = options.neural.steps if options.method == "neural-field" else 0
    return options.views + options.held_out + steps


def given_artifact(artifact: KnownArtifact | None, backbone: Backbone, options: DenoiseOptions) -> Tensor | None:
    """The values (h, w, C) of the artifact that stage 1 is given, on the grid of its views; None where it has none.

    Subtraction needs one, and takes the one that comes with the package where none is given.

    Raises:
        ArtifactError: if it is that of another backbone, or is needed and there is none.
        FormatError: if its file is missing, damaged or something else.
        PlanError: if values come in another shape, or are not finite.
        SizeError: if the size does not fit the patch grid.
    """
    if artifact is None and options.method == "subtract":
        artifact = SHIPPED
    return known_artifact(artifact, backbone, backbone.grid_size(*_view_size(backbone, options)))


def prepare(
    backbone: Backbone, options: DenoiseOptions, artifact: Tensor | None = None
) -> tuple[ViewPlan, ViewPlan | None]:
    """The views to fit, the full image first, and the views to judge by; the exact solver's factors are computed.

    Raises:
        SizeError: if the size does not fit the patch grid.
        PlanError: if the views are too few.
    """
    options.validate()
    fitted, held_out = _plans(backbone, options, _view_size(backbone, options))
    if options.method == "exact":
        solver_for(fitted, options, backbone.device).factorise(artifact_known=artifact is not None)
    return fitted, held_out


def _view_size(backbone: Backbone, options: DenoiseOptions) -> tuple[int, int]:
    side = backbone.default_size if options.size is None else options.size
    return (side, side) if isinstance(side, int) else side


def _plans(backbone: Backbone, options: DenoiseOptions, size: tuple[int, int]) -> tuple[ViewPlan, ViewPlan | None]:
    h, w = backbone.grid_size(*size)
    exact, once = options.method == "exact", options.method in ONE_PASS
    # Patch centres are nodes at odd multiples of the grid: there, sampling the network loses nothing.
    overlap = backbone.stride < backbone.patch_size
    own_nodes = None if exact or (once and overlap) else (h, w) if once else (3 * h, 3 * w)

    def plan(views: int, seed: int, full_image: bool) -> ViewPlan:
        return ViewPlan.make(
            views,
            size=size,
            patch_size=backbone.patch_size,
            stride=backbone.stride,
            resolution=own_nodes if options.resolution is None or once else options.resolution,
            seed=seed,
            full_image=full_image,
            taper=options.taper if exact else 0,
            crops=CropOptions(coverage=options.coverage),
        )

    if once:
        return plan(1, 0, True), None
    held_out = plan(options.held_out, options.seed + _HELD_OUT_SEED, False) if options.held_out else None
    return plan(options.views, options.seed, True), held_out


@dataclass(frozen=True)
class _Job:
    """One photo, its views, and how to run."""

    backbone: Backbone
    image: Tensor
    fitted: ViewPlan
    held_out: ViewPlan | None
    options: DenoiseOptions
    report: _Reporter

    def features(self, plan: ViewPlan) -> Iterator[Tensor]:
        """Features of the views of a plan, batch by batch, (B, h, w, C) each."""
        for features in extract_views(self.backbone, self.image, plan, self.options.batch_size):
            yield features
            self.report.add(len(features))


@dataclass(frozen=True)
class _Parts:
    field: Tensor
    artifact: Tensor
    raw: Tensor
    residual: Tensor | None
    info: dict[str, Any]


def _separate_exactly(job: _Job, artifact: Tensor | None) -> _Parts:
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
    return _Parts(field, artifact, first[0], None, info)  # view 0 is the full image


def _judge(job: _Job, field: Tensor, artifact: Tensor) -> dict[str, float | None]:
    """Held-out figures; None where no views are held out."""
    if job.held_out is None:
        return {"heldout_r2": None, "heldout_cosine": None}
    judge = HeldOut(field, artifact, job.held_out)
    for features in job.features(job.held_out):
        judge.add_views(features)
    return {"heldout_r2": judge.r2, "heldout_cosine": judge.cosine}


def _separate_neurally(job: _Job, artifact: Tensor | None, watch: Callable[[Evaluation], None] | None) -> _Parts:
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
        progress=lambda _: job.report.add(1),
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
    return _Parts(field, shared, raw, fit.predict_residual(raw), info)


def _subtract(job: _Job, artifact: Tensor | None) -> _Parts:
    """One pass over the whole photo, minus the known artifact; there is nothing to fit."""
    assert artifact is not None
    (features,) = job.features(job.fitted)
    require_finite(features)
    raw = features[0]
    artifact = artifact.to(raw)
    field = on_nodes(raw - artifact, job.fitted)
    return _Parts(field, artifact, raw, None, {"heldout_r2": None, "heldout_cosine": None})


def _map_to_clean(job: _Job, found: FoundDenoiser) -> _Parts:
    """One pass over the whole photo, mapped to clean features; what G was and what h was, nothing tells."""
    (features,) = job.features(job.fitted)
    require_finite(features)
    with torch.no_grad():
        clean = found.denoiser(features.to(found.denoiser.pos_embed.device))
    require_finite(clean)
    info = {"heldout_r2": None, "heldout_cosine": None, "denoiser": found.recorded}
    return _Parts(on_nodes(clean[0], job.fitted), torch.zeros_like(features[0]), features[0], None, info)


def gather(features: Iterator[Tensor], plan: ViewPlan) -> SeenViews:
    """Keeps the features of all views of a plan, in float16 where they fit: those of 768 views take 0.8 GB.

    Raises:
        BackboneError: if a value is not finite.
    """
    batches = []
    for batch in features:
        require_finite(batch)
        fits = float(batch.abs().max()) < torch.finfo(torch.float16).max
        batches.append(batch.half() if fits else batch)
    return SeenViews(plan, torch.cat(batches))


def solver_for(plan: ViewPlan, options: DenoiseOptions, device: torch.device) -> ExactSolver:
    """The exact solver of a plan; photos that share a plan share its factors, which depend on the crops alone."""
    solving = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    return _solver(plan, options.smoothness, options.shrinkage, solving)


@functools.lru_cache(maxsize=2)
def _solver(plan: ViewPlan, smoothness: float, shrinkage: float, device: torch.device) -> ExactSolver:
    return ExactSolver(plan, smoothness=smoothness, shrinkage=shrinkage, device=device)


class _Reporter:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self.add(0)

    def add(self, done: int) -> None:
        self._done += done
        if self._progress is not None:
            self._progress(self._done, self._total)


def describe(backbone: Backbone) -> dict[str, Any]:
    """What is recorded of a backbone with every result, as JSON values."""
    return {
        "name": backbone.name,
        "weights": backbone.weights,
        "fingerprint": backbone.fingerprint.values,
        "layer": backbone.layer,
        "norm": backbone.norm,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": backbone.device.type,
    }
