"""What bfloat16 costs in accuracy and saves in time, with torch's attention and with ours.

    python benchmarks/precision.py PHOTO... [--size 518]

Features of each whole photo in float32 against: bfloat16 with torch's fused attention, bfloat16 with the
blocked attention of this package, and the same without subtracting the mean key. Prints cosines over all patches and
the time per view, in alternating runs of one process; then the cosine between the semantic maps of the first photo.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro
from torch import Tensor

import denoising_vit as dv
from denoising_vit.backbones import Backbone
from denoising_vit.data.photos import read_photo
from denoising_vit.views.plan import ViewPlan
from denoising_vit.views.rendering import ViewRenderer, to_image

_BASE, _ATTENTION = "denoising_vit.backbones.base", "denoising_vit.backbones.passes"


def main(
    photos: tyro.conf.Positional[tuple[Path, ...]],
    /,
    size: int = 518,
    runs: int = 3,
    views: int = 64,
    backbone: str = "vit_small_patch14_dinov2.lvd142m",
) -> None:
    """Compares bfloat16 with float32."""
    exact, low = (dv.load_backbone(backbone, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    images = torch.cat([whole(exact, photo, size) for photo in photos])
    jobs: dict[str, Callable[[Tensor], Tensor]] = {
        "float32": exact,
        "bfloat16, fused attention": lambda image: fused(low, image),
        "bfloat16, blocked attention": low,
        "bfloat16, blocked, mean key kept": lambda image: mean_key_kept(low, image),
    }
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in jobs}
    truth = features(exact, images)
    for name, job in jobs.items():
        cosine = torch.cosine_similarity(features(job, images), truth, dim=-1)
        found[name] |= {"mean_cosine": float(cosine.mean()), "least_cosine": float(cosine.min())}
    for _ in range(runs):
        for name, job in jobs.items():
            started = time.perf_counter()
            features(job, images)
            found[name]["seconds"].append((time.perf_counter() - started) / len(images))
    for row in found.values():
        row["seconds"] = statistics.median(row["seconds"])
    fields = [dv.denoise_image(model, photos[0], size=size, views=views).semantic for model in (exact, low)]
    stage1 = torch.cosine_similarity(*fields, dim=-1)
    result = {
        "photos": len(photos),
        "features": found,
        "speedup": found["float32"]["seconds"] / found["bfloat16, blocked attention"]["seconds"],
        "semantic": {"mean_cosine": float(stage1.mean()), "least_cosine": float(stage1.min())},
    }
    print(json.dumps(result, indent=2))


def whole(model: Backbone, photo: Path, size: int) -> Tensor:
    """The photo as one normalised view, (1, 3, size, size)."""
    plan = ViewPlan.make(1, size=(size, size), patch_size=model.patch_size, stride=model.stride)
    return ViewRenderer(to_image(read_photo(photo), model.device), plan, model.mean, model.std)(slice(None))


def features(job: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """(N, h, w, C), two images at a time."""
    with torch.inference_mode():
        return torch.cat([job(part) for part in images.split(2)])


def fused(model: Backbone, image: Tensor) -> Tensor:
    """The backbone with torch's own attention."""
    with mock.patch(f"{_BASE}.BlockedAttention", torch.overrides.BaseTorchFunctionMode):
        return model(image)


def mean_key_kept(model: Backbone, image: Tensor) -> Tensor:
    """The backbone with blocked attention, without subtracting the mean key."""
    with mock.patch(f"{_ATTENTION}._centred", lambda key: key):
        return model(image)


if __name__ == "__main__":
    tyro.cli(main)
