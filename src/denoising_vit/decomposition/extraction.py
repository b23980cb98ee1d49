"""From a photo to the features of its views."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.batching import Passes
from denoising_vit.data.photos import photo_digest, read_photo
from denoising_vit.errors import PhotoError
from denoising_vit.views.plan import ViewPlan
from denoising_vit.views.rendering import ViewRenderer, to_image

Photo = str | Path | Image.Image | np.ndarray | Tensor


def load_image(photo: Photo, backbone: Backbone) -> tuple[Tensor, dict[str, Any]]:
    """The image (3, H, W) in [0, 1] on the backbone's device, and what is recorded of it.

    Raises:
        PhotoError: if the photo cannot be read, or holds less than one patch.
        BackboneError: if a tensor has values that no photo is normalised to.
    """
    if isinstance(photo, Tensor):
        if photo.ndim != 4 or len(photo) != 1 or photo.shape[1] != 3 or not photo.is_floating_point():
            got = f"{tuple(photo.shape)} of {photo.dtype}"
            raise PhotoError(f"expected a normalised (1, 3, H, W) float tensor, got {got}")
        mean, std = (
            torch.tensor(values, device=backbone.device)[:, None, None] for values in (backbone.mean, backbone.std)
        )
        backbone.check_values(photo)
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


@torch.no_grad()  # not inference mode: results are to be usable in a caller's own training
def extract_views(backbone: Backbone, image: Tensor, plan: ViewPlan, batch_size: int | None = None) -> Iterator[Tensor]:
    """Features of the views of an image (3, H, W) in [0, 1], batch by batch, (B, h, w, C) float32 each."""
    batch_size = batch_size or fitting_batch(backbone.device, math.prod(plan.grid))
    render, forward = ViewRenderer(image, plan, backbone.mean, backbone.std), Passes(backbone)
    for start in range(0, len(plan), batch_size):
        yield forward(render(slice(start, start + batch_size)))


def fitting_batch(device: torch.device, tokens: int) -> int:
    """Views a forward pass: on a CPU just enough tokens to fill it, since larger batches leave its cache."""
    return min(max((65536 if device.type == "cuda" else 4096) // tokens, 1), 32)
