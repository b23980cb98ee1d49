"""Restore the contrast that stage 3 takes from features.

A student learns the mean of what its noisy targets could be, so its features vary less than raw ones: a ViT-S/14
(DINOv2) loses a quarter of their variance. Directions hardly change, but methods that read the sign of inner products,
such as LOST, then take too many patches for similar (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.timm_vit import TimmBackbone
from denoising_vit.errors import PlanError


@torch.no_grad()
def contrast(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, Tensor]:
    """The factor by which raw features deviate more from their mean than the student's, and the student's mean (C,).

    Args:
        pairs: features (B, h, w, C) of the distilled ViT and raw features, of the same images.

    Raises:
        PlanError: if the student's features do not vary.
    """
    student, raw = _Moments(), _Moments()
    for found, wanted in pairs:
        student.add(found)
        raw.add(wanted)
    if student.variance <= 0:
        raise PlanError("features of the distilled ViT are the same everywhere on these photos: no contrast to restore")
    return (raw.variance / student.variance) ** 0.5, student.mean


@dataclass
class _Moments:
    """Sums over patches: of features (C,), of their squares over channels, and the number of patches."""

    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: float = 0.0
    count: int = 0

    def add(self, features: Tensor) -> None:
        patches = features.flatten(0, 2).double().cpu()
        self.total = self.total + patches.sum(0)
        self.squares += float(patches.square().sum())
        self.count += len(patches)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def variance(self) -> float:
        """Variance over patches, summed over channels."""
        return self.squares / self.count - float(self.mean.square().sum())


def final_norm(student: Backbone) -> str:
    """Name in timm of the norm that follows the block of these features.

    Raises:
        PlanError: if there is none with a bias, or the model is not a timm model.
    """
    if not isinstance(student, TimmBackbone):
        raise PlanError(f"contrast is restored in the final norm of a timm model; got {student.name}")
    model, last = student.model, len(student.model.blocks) - 1
    name = "fc_norm" if isinstance(model.norm, nn.Identity) else "norm"
    parts = {f"{name}.weight", f"{name}.bias"}
    if not student.norm or student.layer != last or not parts <= model.state_dict().keys():
        raise PlanError(
            f"{student.name} at layer {student.layer}: contrast is restored in a final norm with a bias, after layer "
            f"{last}; got {'another layer' if student.layer != last else 'none'}"
        )
    return name


def restored(
    state: dict[str, Tensor], norm: str, pairs: Iterable[tuple[Tensor, Tensor]], photos: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights whose features vary as much as raw ones, by their names in timm, and the record of the change.

    Args:
        state: weights by their names in timm.
        norm: name of the norm to change, see :func:`final_norm`.
        pairs: features as for :func:`contrast`.
        photos: number of photos that they are of, for the record.

    Raises:
        PlanError: if the student's features do not vary.
    """
    factor, mean = contrast(pairs)
    return stretched(state, norm, factor, mean), {"contrast": {"factor": round(factor, 4), "photos": photos}}


@torch.no_grad()
def stretched(state: dict[str, Tensor], norm: str, factor: float, mean: Tensor) -> dict[str, Tensor]:
    """Weights whose features are f' = mean + factor (f - mean), by their names in timm.

    Only the final norm changes, whose output is affine in its weights. It applies to class token and registers too.
    """
    weight, bias = (state[f"{norm}.{part}"].float() for part in ("weight", "bias"))
    return state | {
        f"{norm}.weight": factor * weight,
        f"{norm}.bias": factor * bias + (1 - factor) * mean.to(bias),
    }
