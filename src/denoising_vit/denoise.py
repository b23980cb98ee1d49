"""Stage 1 for one photo: render views, run the backbone over them, separate what they agree on."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.decomposition import Decomposition, ExactSolver, Statistics
from denoising_vit.decomposition.heldout import HeldOut
from denoising_vit.errors import PhotoError, PlanError
from denoising_vit.photos import photo_digest, read_photo
from denoising_vit.rendering import ViewRenderer, to_image
from denoising_vit.views import CropOptions, ViewPlan

Method = Literal["exact"]
Photo = str | Path | Image.Image | np.ndarray | Tensor
Progress = Callable[[int, int], None]

#: Added to the seed for the views that are left out of the fit, so that they are others than the fitted ones.
_HELD_OUT_SEED = 1_000_003


@dataclass(frozen=True)
class DenoiseOptions:
    """How stage 1 is run.

    Attributes:
        method: how field and artifact are found; exact is linear least squares.
        views: crops of the photo that are fitted, the whole photo included.
        held_out: further crops, which only judge the fit.
        size: height and width of a view in pixels, or one number for a square. Without it, the backbone's own.
        resolution: nodes of the semantic field along each side. Without it, twice the patch grid.
        smoothness: weight of the penalty on differences within the semantic field.
        shrinkage: weight of the penalty on the artifact's size.
        clip: scale down tokens whose norm is more than this many median absolute deviations above the median, so that
            outliers pull less. Without it, none are.
        coverage: even sees borders nearly as often as the middle; plain draws crops as published.
        taper: share of a crop's side over which its patches gain weight from the border inwards; without it (0), seams
            show where crops end.
        seed: of the crops; the same seed gives the same result.
        batch_size: views in one forward pass. Without it, what suits the device.
    """

    method: Method = "exact"
    views: int = 64
    held_out: int = 8
    size: int | tuple[int, int] | None = None
    resolution: int | None = None
    smoothness: float = 1e-2
    shrinkage: float = 1e-3
    clip: float | None = None
    coverage: Literal["even", "plain"] = "even"
    taper: float = 0.3
    seed: int = 0
    batch_size: int | None = None

    def validate(self) -> None:
        """Checks what does not depend on the backbone.

        Raises:
            PlanError: naming the option, its range, and what came.
        """
        if self.method != "exact":
            raise PlanError(f"method must be 'exact', got {self.method!r}")
        least: dict[str, int] = {"views": 1, "held_out": 0, "batch_size": 1, "seed": 0, "smoothness": 0, "shrinkage": 0}
        for name, least_value in least.items():
            value = getattr(self, name)
            if value is not None and not value >= least_value:  # NaN is not
                raise PlanError(f"{name} must be at least {least_value}, got {value}")
        if self.clip is not None and not self.clip > 0:
            raise PlanError(f"clip must be a positive number of median absolute deviations, got {self.clip}")


def denoise_image(
    backbone: Backbone,
    photo: Photo,
    *,
    artifact: Tensor | None = None,
    progress: Progress | None = None,
    options: DenoiseOptions | None = None,
    **changes: Any,
) -> Decomposition:
    """Separates a photo's features into semantic field, shared artifact and residual (the paper's per-image denoising).

    Args:
        backbone: from :func:`~denoising_vit.load_backbone`.
        photo: a path, a PIL image, an (H, W, 3) uint8 array, or a normalised (1, 3, H, W) tensor.
        artifact: the backbone's artifact (h, w, C) where it is known; then only the field is fitted.
        progress: called as ``progress(done, total)`` after each batch of views.
        options: how to run; the defaults where none.
        **changes: single fields of :class:`DenoiseOptions`, such as ``views=128``.

    Returns:
        The decomposition on the patch grid of ``size``, on the CPU.

    Raises:
        PhotoError: if the photo cannot be read or used.
        SizeError: if the size does not fit the patch grid.
        PlanError: if the views are too few, or an option is out of range.
        BackboneError: if the features are not finite or not a grid.
    """
    options = replace(options or DenoiseOptions(), **changes)
    started = time.perf_counter()
    image, about = _load(photo, backbone)
    if isinstance(photo, Tensor) and options.size is None:
        options = replace(options, size=tuple(photo.shape[2:]))  # its owner has prepared it: it is shown as it is
    known = None if artifact is None else artifact.detach().cpu().double()
    # Fails before the forward passes, not after them, where views are too few or the size is off the grid.
    fitted, held_out = prepare(backbone, options, artifact)
    solver = _solver(fitted, options.smoothness, options.shrinkage, _solving_device(backbone.device))

    report = _Reporter(progress, options.views + options.held_out)
    statistics = Statistics(fitted, backbone.embed_dim, device=backbone.device, clip=options.clip)
    views = extract_views(backbone, image, fitted, options.batch_size)
    first = next(views)
    for features in itertools.chain([first], views):
        statistics.add(features)
        report.add(len(features))
    if known is None:
        field, known = solver.solve(statistics.b, statistics.g)
    else:
        known = known.to(statistics.b)
        field = solver.solve_field(statistics.b, known)
    judged = _judge(backbone, image, field, known, held_out, options, report)
    return Decomposition(
        field=field.float().cpu(),
        artifact=known.float().cpu(),
        raw=first[0].cpu(),  # view 0 is the full image
        size=fitted.size,
        patch_size=backbone.patch_size,
        stride=backbone.stride,
        info={
            "version": importlib.metadata.version("denoising-vit"),
            "photo": about,
            "backbone": _describe(backbone),
            "plan": fitted.digest,
            **asdict(options),
            **judged,
            "artifact_known": artifact is not None,
            "clipped_tokens": statistics.clipped_tokens,
            "seconds": round(time.perf_counter() - started, 3),
        },
    )


def prepare(
    backbone: Backbone, options: DenoiseOptions, artifact: Tensor | None = None
) -> tuple[ViewPlan, ViewPlan | None]:
    """The views to fit, the full image first, and the views to judge by; computes the factors of the former.

    Raises:
        SizeError: if the size does not fit the patch grid.
        PlanError: if the views are too few, or the artifact has another shape than the grid.
    """
    options.validate()
    side = backbone.default_size if options.size is None else options.size
    size = (side, side) if isinstance(side, int) else side
    grid = backbone.grid_size(*size)
    if artifact is not None and tuple(artifact.shape) != (*grid, backbone.embed_dim):
        raise PlanError(
            f"the given artifact has shape {tuple(artifact.shape)}, expected {(*grid, backbone.embed_dim)} for "
            f"{backbone.name} on views of {size[0]} x {size[1]}"
        )
    if artifact is not None and not torch.isfinite(artifact).all():
        raise PlanError("the given artifact has values that are not finite")
    fitted, held_out = _plans(backbone, options, size)
    solver = _solver(fitted, options.smoothness, options.shrinkage, _solving_device(backbone.device))
    solver.factorise(artifact_known=artifact is not None)
    return fitted, held_out


def _plans(backbone: Backbone, options: DenoiseOptions, size: tuple[int, int]) -> tuple[ViewPlan, ViewPlan | None]:
    def plan(views: int, seed: int, full_image: bool) -> ViewPlan:
        return ViewPlan.make(
            views,
            size=size,
            patch_size=backbone.patch_size,
            stride=backbone.stride,
            resolution=options.resolution,
            seed=seed,
            full_image=full_image,
            taper=options.taper,
            crops=CropOptions(coverage=options.coverage),
        )

    held_out = plan(options.held_out, options.seed + _HELD_OUT_SEED, False) if options.held_out else None
    return plan(options.views, options.seed, True), held_out


@torch.no_grad()  # not inference mode: results are to be usable in a caller's own training
def extract_views(backbone: Backbone, image: Tensor, plan: ViewPlan, batch_size: int | None = None) -> Iterator[Tensor]:
    """Features of the views of an image (3, H, W) in [0, 1], batch by batch, (B, h, w, C) float32 each."""
    batch_size = batch_size or _batch_size(backbone.device, math.prod(plan.grid))
    render = ViewRenderer(image, plan, backbone.mean, backbone.std)
    for start in range(0, len(plan), batch_size):
        yield backbone(render(slice(start, start + batch_size)))


def _batch_size(device: torch.device, tokens: int) -> int:
    """Views a forward pass: on a CPU just enough tokens to fill it, since larger batches leave its cache."""
    return min(max((65536 if device.type == "cuda" else 4096) // tokens, 1), 32)


@functools.lru_cache(maxsize=2)
def _solver(plan: ViewPlan, smoothness: float, shrinkage: float, device: torch.device) -> ExactSolver:
    """The factors depend on the crops alone: photos that share a plan share them."""
    return ExactSolver(plan, smoothness=smoothness, shrinkage=shrinkage, device=device)


def _solving_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device  # MPS has no float64


def _judge(
    backbone: Backbone,
    image: Tensor,
    field: Tensor,
    artifact: Tensor,
    plan: ViewPlan | None,
    options: DenoiseOptions,
    report: _Reporter,
) -> dict[str, float | None]:
    """Held-out figures; None where no views are held out."""
    if plan is None:
        return {"heldout_r2": None, "heldout_cosine": None}
    judge = HeldOut(field, artifact, plan)
    for features in extract_views(backbone, image, plan, options.batch_size):
        judge.add(features)
        report.add(len(features))
    return {"heldout_r2": judge.r2, "heldout_cosine": judge.cosine}


class _Reporter:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self.add(0)

    def add(self, views: int) -> None:
        self._done += views
        if self._progress is not None:
            self._progress(self._done, self._total)


def _load(photo: Photo, backbone: Backbone) -> tuple[Tensor, dict[str, Any]]:
    """The image (3, H, W) in [0, 1] on the backbone's device, and what is recorded of it."""
    if isinstance(photo, Tensor):
        if photo.ndim != 4 or len(photo) != 1 or photo.shape[1] != 3 or not photo.is_floating_point():
            got = f"{tuple(photo.shape)} of {photo.dtype}"
            raise PhotoError(f"expected a normalised (1, 3, H, W) float tensor, got {got}")
        mean, std = (
            torch.tensor(values, device=backbone.device)[:, None, None] for values in (backbone.mean, backbone.std)
        )
        image, name = photo[0].to(backbone.device, torch.float32) * std + mean, None
        digest = photo_digest(photo.detach().float().cpu().numpy())
    else:
        pixels = read_photo(photo)
        image, name = to_image(pixels, backbone.device), Path(photo).name if isinstance(photo, str | Path) else None
        digest = photo_digest(pixels)
    height, width = image.shape[1:]
    if min(height, width) < backbone.patch_size:
        raise PhotoError(
            f"{f'{name}: ' if name else ''}{width} x {height} pixels is less than one patch of {backbone.patch_size} "
            f"pixels; expected at least {backbone.patch_size} on each side"
        )
    if not torch.isfinite(image).all():
        raise PhotoError("the image has values that are not finite")
    return image, {"name": name, "height": height, "width": width, "sha256": digest}


def _describe(backbone: Backbone) -> dict[str, Any]:
    return {
        "name": backbone.name,
        "weights": backbone.weights,
        "fingerprint": backbone.fingerprint.values,
        "layer": backbone.layer,
        "norm": backbone.norm,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": backbone.device.type,
    }
