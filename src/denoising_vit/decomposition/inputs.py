"""Inputs of stage 1: photos, their views, the artifact if known, and the solver shared by photos."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from denoising_vit.artifact import SHIPPED, KnownArtifact, known_artifact
from denoising_vit.backbones import Backbone
from denoising_vit.backbones.passes import Passes
from denoising_vit.data import Skipped, find_photos
from denoising_vit.data.photos import photo_digest, read_photo
from denoising_vit.decomposition.exact import ExactSolver
from denoising_vit.decomposition.options import STAGE_ONE, DenoiseOptions
from denoising_vit.errors import PhotoError
from denoising_vit.views.plan import ViewPlan
from denoising_vit.views.rendering import ViewRenderer, per_channel, to_image

#: Deviation (of 255) of pixels below which a photo has no content that moves from crop to crop.
_CONTENT = 1.0

#: Approximate number of pixel rows and columns to check for content.
_LOOKED_AT = 512

#: Added to the seed for the held-out views, so that they differ from the fitted ones.
_HELD_OUT_SEED = 1_000_003

Photo = str | Path | Image.Image | np.ndarray | Tensor


def load_image(photo: Photo, backbone: Backbone, digest: str | None = None) -> tuple[Tensor, dict[str, Any]]:
    """The image (3, H, W) in [0, 1] on the backbone's device, and its record; computes its digest unless given.

    Raises:
        PhotoError: if the photo cannot be read, or is smaller than one patch.
        BackboneError: if a tensor has values outside the range of normalised photos.
    """
    if isinstance(photo, Tensor):
        if photo.ndim != 4 or len(photo) != 1 or photo.shape[1] != 3 or not photo.is_floating_point():
            got = f"{tuple(photo.shape)} of {photo.dtype}"
            raise PhotoError(f"expected a normalised (1, 3, H, W) float tensor, got {got}")
        mean, std = (per_channel(values, backbone.device) for values in (backbone.mean, backbone.std))
        backbone.check_values(photo)
        image, name = photo[0].to(backbone.device, torch.float32) * std + mean, None
        digest = digest or photo_digest(photo.detach().float().cpu().numpy())
    else:
        pixels = read_photo(photo)
        image, name = to_image(pixels, backbone.device), Path(photo).name if isinstance(photo, str | Path) else None
        digest = digest or photo_digest(pixels)
    height, width = image.shape[1:]
    if min(height, width) < backbone.patch_size:
        raise PhotoError(
            f"{f'{name}: ' if name else ''}{width} x {height} pixels are less than one patch of {backbone.patch_size} "
            f"pixels; expected at least {backbone.patch_size} per side"
        )
    if not torch.isfinite(image).all():
        raise PhotoError("the image has values that are not finite")
    return image, {"name": name, "height": height, "width": width, "sha256": digest}


def named_pixels(photos: Iterable[Any]) -> Iterator[tuple[str, np.ndarray | Skipped]]:
    """Photos in any form, as (name, pixels (H, W, 3) uint8 or the reason for skipping)."""
    if isinstance(photos, Image.Image) or (isinstance(photos, np.ndarray) and photos.ndim == 3):
        photos = [photos]  # a single photo
    if isinstance(photos, str | Path):
        photos, missing = find_photos([photos])
        yield from ((item.item, item) for item in missing)
    for number, photo in enumerate(photos):
        name = f"photo {number}" if isinstance(photo, np.ndarray | Image.Image) else str(photo)
        try:
            yield name, read_photo(photo)
        except PhotoError as error:
            yield name, Skipped(name, str(error).removeprefix(f"{name}: "))
        except TypeError:
            kind = type(photo).__name__
            yield (f"photo {number}", Skipped(f"photo {number}", f"expected a path, PIL image or array, got {kind}"))


def with_content(photos: Iterable[tuple[str, np.ndarray | Skipped]]) -> Iterator[tuple[str, np.ndarray | Skipped]]:
    """Skip photos of a single colour, and duplicates.

    Photos of a single colour look the same in every crop, so they cannot separate G and F; duplicates agree trivially.
    """
    seen: dict[str, str] = {}
    for name, pixels in photos:
        if isinstance(pixels, Skipped):
            yield name, pixels
            continue
        digest = photo_digest(pixels)
        if not _has_content(pixels):
            yield name, Skipped(name, "no content: all pixels are the same")
        elif digest in seen:
            yield name, Skipped(name, f"a duplicate of {seen[digest]}")
        else:
            seen[digest] = name
            yield name, pixels


def _has_content(pixels: np.ndarray) -> bool:
    """True if pixels differ; checked on a subset, because large photos would take gigabytes."""
    rows, columns = (max(side // _LOOKED_AT, 1) for side in pixels.shape[:2])
    return pixels.size > 0 and float(pixels[::rows, ::columns].std(axis=(0, 1)).max()) >= _CONTENT


@torch.no_grad()  # not inference mode, so that a caller can train on the results
def extract_views(backbone: Backbone, image: Tensor, plan: ViewPlan, batch_size: int | None = None) -> Iterator[Tensor]:
    """Features of the views of an image (3, H, W) in [0, 1], batch by batch, (B, h, w, C) float32 each."""
    batch_size = batch_size or fitting_batch(backbone.device, math.prod(plan.grid))
    render, forward = ViewRenderer(image, plan, backbone.mean, backbone.std), Passes(backbone)
    for start in range(0, len(plan), batch_size):
        yield forward(render(slice(start, start + batch_size)))


def fitting_batch(device: torch.device, tokens: int) -> int:
    """Number of views per forward pass; on a CPU, just enough to use all cores, because more would exceed its cache."""
    return min(max((65536 if device.type == "cuda" else 4096) // tokens, 1), 32)


def given_artifact(artifact: KnownArtifact | None, backbone: Backbone, options: DenoiseOptions) -> Tensor | None:
    """Values (h, w, C) of the given artifact on the grid of the views; None if none is given.

    The method subtract needs an artifact and defaults to the one in the package.

    Raises:
        ArtifactError: if it belongs to another backbone, or is needed but missing.
        FormatError: if its file is missing, damaged or of another type.
        PlanError: if values have a wrong shape, or are not finite.
        SizeError: if the size does not fit the patch grid.
    """
    if artifact is None and options.method == "subtract":
        artifact = SHIPPED
    return known_artifact(artifact, backbone, backbone.grid_size(*_view_size(backbone, options)))


def prepare(
    backbone: Backbone, options: DenoiseOptions, artifact: Tensor | None = None
) -> tuple[ViewPlan, ViewPlan | None]:
    """The views to fit, starting with the full image, and the held-out views; also computes the exact solver's factors.

    Raises:
        SizeError: if the size does not fit the patch grid.
        PlanError: if there are too few views.
    """
    options.validate()
    fitted, held_out = _plans(backbone, options, _view_size(backbone, options))
    if options.method == "exact":
        solver_for(fitted, options, backbone.device).factorise(artifact_known=artifact is not None)
    return fitted, held_out


def solver_for(plan: ViewPlan, options: DenoiseOptions, device: torch.device) -> ExactSolver:
    """The exact solver of a plan; photos with the same plan share its factors, which depend only on the crops."""
    solving = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    return _solver(plan, options.smoothness, options.shrinkage, options.offsets, solving)


@functools.lru_cache(maxsize=2)
def _solver(plan: ViewPlan, smoothness: float, shrinkage: float, offsets: bool, device: torch.device) -> ExactSolver:
    return ExactSolver(plan, smoothness=smoothness, shrinkage=shrinkage, offsets=offsets, device=device)


def _view_size(backbone: Backbone, options: DenoiseOptions) -> tuple[int, int]:
    side = backbone.default_size if options.size is None else options.size
    return (side, side) if isinstance(side, int) else side


def _plans(backbone: Backbone, options: DenoiseOptions, size: tuple[int, int]) -> tuple[ViewPlan, ViewPlan | None]:
    h, w = backbone.grid_size(*size)
    exact, once = options.method == "exact", options.method not in STAGE_ONE
    # At odd multiples of the grid, patch centres are nodes, so sampling the network there is lossless.
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
