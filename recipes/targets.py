"""Stage 1 of many scenes at once: raw features, and F at the same patches, kept on the device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scenes import Scene, render
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.decomposition.exact import ExactSolver
from denoising_vit.decomposition.statistics import field_products
from denoising_vit.views.options import CropOptions
from denoising_vit.views.plan import ViewPlan

#: Number of scenes solved together.
_TOGETHER = 16


@dataclass
class Pairs:
    """Raw features and targets of scenes of one size, float16 on the device.

    Attributes:
        raw: (N, h, w, C).
        mirrored: raw features of the mirrored scenes, (N, h, w, C).
        target: F at the patches of the scene where no artifact is modelled, (N, h, w, C).
        photo: index of the photo of each, (N,).
        plan: number of the plan of each, (N,).
        shift: offset for the targets of a plan that makes them those of a known artifact, (plans, h, w, C).
    """

    raw: Tensor
    mirrored: Tensor
    target: Tensor
    photo: Tensor
    plan: Tensor
    shift: Tensor


class Stage1:
    """The exact solver of one plan, for batches of images on the device, without an artifact."""

    def __init__(self, backbone: Backbone, plan: ViewPlan, smoothness: float = 1e-2, *, offsets: bool = False) -> None:
        self.backbone, self.plan = backbone, plan
        device = backbone.device
        self.solver = ExactSolver(plan, smoothness=smoothness, shrinkage=1e-3, offsets=offsets, device=device)
        self._weighted = [weight.to(device, torch.float32) for weight in plan.weighted]
        self._whole = [weight[0].to(device) for weight in plan.weights]  # the first view is the whole image

    def sums(self, features: Tensor) -> Tensor:
        """B (Ry, Rx, C), float64, of the features (V, h, w, C) of all views of an image."""
        return field_products(features, *self._weighted).double()

    def at_patches(self, b: Tensor, artifact: Tensor | None = None) -> Tensor:
        """F at the patches of the whole image, (h, w, C N), from b (Ry, Rx, C N)."""
        return self.sampled(self.solver.solve_field(b, artifact))

    def sampled(self, field: Tensor) -> Tensor:
        """The field (Ry, Rx, C) at the patches of the whole image, (h, w, C)."""
        down, across = self._whole
        return torch.einsum("hr,rsc,ws->hwc", down, field, across)


def plans(
    backbone: Backbone, size: tuple[int, int], views: int, area: tuple[float, float], count: int
) -> list[ViewPlan]:
    """Plans that differ in their crops; the first view of each is the whole image."""
    crops = CropOptions(area=area)
    make = {"size": size, "patch_size": backbone.patch_size, "taper": 0.3, "crops": crops}
    return [ViewPlan.make(views, seed=seed, **make) for seed in range(count)]


@torch.no_grad()
def fit(
    backbone: Backbone,
    photos: Sequence[Tensor],
    scenes: Sequence[Scene],
    made: Sequence[ViewPlan],
    artifact: Tensor | None,
    batch: int = 64,
) -> Pairs:
    """Computes raw features and targets of scenes of one size.

    Args:
        backbone: the extractor.
        photos: (3, H, W) uint8 on the device.
        scenes: parts of them.
        made: plans of one size; scenes use them in turn.
        artifact: G (h, w, C) that can be subtracted, for `Pairs.shift`.
        batch: views per forward pass.
    """
    h, w = made[0].grid
    channels, device = backbone.embed_dim, backbone.device
    raws, mirrors, targets = (
        torch.empty(len(scenes), h, w, channels, dtype=torch.float16, device=device) for _ in range(3)
    )
    shift = torch.zeros(len(made), h, w, channels, dtype=torch.float16, device=device)
    for number, plan in enumerate(made):
        stage = Stage1(backbone, plan)
        if artifact is not None:
            nothing = torch.zeros(*plan.resolution, channels, dtype=torch.float64, device=device)
            shift[number] = stage.at_patches(nothing, artifact.to(nothing)).half()
        own = range(number, len(scenes), len(made))
        for start in range(0, len(own), _TOGETHER):
            part = own[start : start + _TOGETHER]
            raw, mirrored, target = fit_some(stage, [scenes[index].cut(photos) for index in part], batch)
            for store, found in zip((raws, mirrors, targets), (raw, mirrored, target), strict=True):
                store[list(part)] = found.half()
    photo = torch.tensor([scene.photo for scene in scenes], device=device)
    plan_of = torch.arange(len(scenes), device=device) % len(made)
    return Pairs(raws, mirrors, targets, photo, plan_of, shift)


def fit_some(stage: Stage1, images: Sequence[Tensor], batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Raw features, those of the mirrored images, and F at the patches, (N, h, w, C) each, of images (3, h, w)."""
    plan, backbone = stage.plan, stage.backbone
    rendered = [render(image, plan.boxes, plan.flips, plan.size, backbone) for image in images]
    shown = torch.cat([*rendered, *(views[:1].flip(-1) for views in rendered)])
    features = torch.cat([backbone(part) for part in shown.split(batch)])
    views, mirrored = features.split([len(plan) * len(images), len(images)])
    each = views.unflatten(0, (len(images), len(plan)))  # (N V, h, w, C) -> (N, V, h, w, C)
    b = torch.cat([stage.sums(one) for one in each], -1)  # (Ry, Rx, N C)
    target = stage.at_patches(b).unflatten(-1, (len(images), -1)).permute(2, 0, 1, 3)  # -> (N, h, w, C)
    return each[:, 0], mirrored, target


def seen(backbone: Backbone, image: Tensor, plan: ViewPlan, batch: int) -> Tensor:
    """Features (V, h, w, C) of all views of an image (3, H, W) uint8."""
    views = render(image, plan.boxes, plan.flips, plan.size, backbone)
    return torch.cat([backbone(part) for part in views.split(batch)])


def clock(started: float) -> str:
    """Elapsed seconds."""
    return f"{time.perf_counter() - started:6.1f} s"


def indices(pairs: Pairs, held_out: np.ndarray) -> tuple[Tensor, Tensor]:
    """Indices of the scenes of training photos, and of held-out photos."""
    out = torch.isin(pairs.photo, torch.from_numpy(held_out).to(pairs.photo))
    return torch.nonzero(~out).flatten(), torch.nonzero(out).flatten()
