"""Restore the contrast that stage 3 takes from features.

A student learns the mean of what its noisy targets could be, so its features vary less than raw ones: a ViT-S/14
(DINOv2) loses a quarter of their variance. Directions hardly change, but methods that read the sign of inner products,
such as LOST, then take too many patches for similar (docs/decisions.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.timm_vit import TimmBackbone
from denoising_vit.errors import PlanError


@torch.no_grad()
def contrast(student: Backbone, raw: Backbone, images: list[Tensor]) -> tuple[float, Tensor]:
    """The factor by which raw features deviate more from their mean than the student's, and the student's mean (C,).

    Args:
        student: the distilled ViT.
        raw: the backbone that it was trained from.
        images: normalised images (B, 3, H, W).

    Raises:
        PlanError: if the student's features do not vary.
    """
    (wanted, _), (found, mean) = (_moments(backbone, images) for backbone in (raw, student))
    if found <= 0:
        raise PlanError(f"{student.name}: features are the same everywhere on these photos; give other photos")
    return (wanted / found) ** 0.5, mean


def _moments(backbone: Backbone, images: list[Tensor]) -> tuple[float, Tensor]:
    """Variance of features over all patches, summed over channels, and their mean (C,)."""
    total, squares, count = torch.zeros(()), 0.0, 0
    for image in images:
        patches = backbone(image).flatten(0, 2).double().cpu()
        total, squares, count = total + patches.sum(0), squares + float(patches.square().sum()), count + len(patches)
    mean = total / count
    return squares / count - float(mean.square().sum()), mean


def final_norm(student: TimmBackbone) -> str:
    """Name in timm of the norm that follows the block of these features.

    Raises:
        PlanError: if there is none with a bias.
    """
    model, last = student.model, len(student.model.blocks) - 1
    name = "fc_norm" if isinstance(model.norm, nn.Identity) else "norm"
    parts = {f"{name}.weight", f"{name}.bias"}
    if not student.norm or student.layer != last or not parts <= model.state_dict().keys():
        raise PlanError(
            f"{student.name} at layer {student.layer}: contrast is restored in a final norm with a bias, after layer "
            f"{last}; got {'another layer' if student.layer != last else 'none'}"
        )
    return name


@torch.no_grad()
def stretched(student: TimmBackbone, norm: str, factor: float, mean: Tensor) -> dict[str, Tensor]:
    """Weights of the student with f' = mean + factor (f - mean), on the CPU, by their names in timm.

    Only the final norm changes, whose output is affine in its weights. It applies to class token and registers too.
    """
    state = {name: value.cpu().clone() for name, value in student.model.state_dict().items()}
    weight, bias = (state[f"{norm}.{part}"] for part in ("weight", "bias"))
    bias.copy_(factor * bias + (1 - factor) * mean.to(bias))
    weight.mul_(factor)
    return state
