"""What all photos of one size share: the views that are fitted, those that are left out, and the solver's factors."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from denoising_vit.artifact import SHIPPED, KnownArtifact, known_artifact
from denoising_vit.backbones import Backbone
from denoising_vit.decomposition.exact import ExactSolver
from denoising_vit.decomposition.options import STAGE_ONE, DenoiseOptions
from denoising_vit.views.plan import ViewPlan

#: Added to the seed for the views that are left out of the fit, so that they are others than the fitted ones.
_HELD_OUT_SEED = 1_000_003


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


def solver_for(plan: ViewPlan, options: DenoiseOptions, device: torch.device) -> ExactSolver:
    """The exact solver of a plan; photos that share a plan share its factors, which depend on the crops alone."""
    solving = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    return _solver(plan, options.smoothness, options.shrinkage, solving)


@functools.lru_cache(maxsize=2)
def _solver(plan: ViewPlan, smoothness: float, shrinkage: float, device: torch.device) -> ExactSolver:
    return ExactSolver(plan, smoothness=smoothness, shrinkage=shrinkage, device=device)


def _view_size(backbone: Backbone, options: DenoiseOptions) -> tuple[int, int]:
    side = backbone.default_size if options.size is None else options.size
    return (side, side) if isinstance(side, int) else side


def _plans(backbone: Backbone, options: DenoiseOptions, size: tuple[int, int]) -> tuple[ViewPlan, ViewPlan | None]:
    h, w = backbone.grid_size(*size)
    exact, once = options.method == "exact", options.method not in STAGE_ONE
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
            crops=options.crops(),
        )

    if once:
        return plan(1, 0, True), None
    held_out = plan(options.held_out, options.seed + _HELD_OUT_SEED, False) if options.held_out else None
    return plan(options.views, options.seed, True), held_out
