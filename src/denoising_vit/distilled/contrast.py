"""Restore the contrast that stage 3 takes from features.

A student learns the mean of what its noisy targets could be, so its features vary less than raw ones, some channels
less than others: a ViT-S/14 (DINOv2) loses a quarter of their variance. Their mean shifts as well. Directions hardly
change, but methods that read the sign of inner products, such as LOST, then take too many patches for similar
(docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.timm_vit import TimmBackbone
from denoising_vit.errors import PlanError


class Contrast(NamedTuple):
    """The change f' = factor f + shift of each channel that restores mean and variance of raw features; both (C,)."""

    factor: Tensor
    shift: Tensor


@torch.no_grad()
def contrast(pairs: Iterable[tuple[Tensor, Tensor]]) -> Contrast:
    """The change that gives each channel of the student's features the mean and variance of the raw one.

    Channels that do not vary, in either, are only shifted.

    Args:
        pairs: features (B, h, w, C) of the distilled ViT and raw features, of the same images.

    Raises:
        PlanError: if no channel of the student's features varies.
    """
    student, raw = _Moments(), _Moments()
    for found, wanted in pairs:
        student.add(found)
        raw.add(wanted)
    varies = (student.variance > 0) & (raw.variance > 0)
    if not (student.variance > 0).any():
        raise PlanError("features of the distilled ViT are the same everywhere on these photos: no contrast to restore")
    factor = torch.where(varies, raw.variance / student.variance, 1.0).sqrt()
    return Contrast(factor, raw.mean - factor * student.mean)


@dataclass
class _Moments:
    """Sums over patches: of features (C,), of their squares (C,), and the number of patches."""

    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))
    count: int = 0

    def add(self, features: Tensor) -> None:
        patches = features.flatten(0, 2).double().cpu()
        self.total = self.total + patches.sum(0)
        self.squares = self.squares + patches.square().sum(0)
        self.count += len(patches)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        """Variance of each channel over patches; 0 where it is below the error of its sums."""
        squares = self.squares / self.count
        variance = squares - self.mean.square()
        return torch.where(variance > 1e-12 * squares, variance, 0.0)


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
    """Weights whose features have the mean and variance of raw ones, by their names in timm, and a record of it.

    Args:
        state: weights by their names in timm.
        norm: name of the norm to change, see :func:`final_norm`.
        pairs: features as for :func:`contrast`.
        photos: number of photos that they are of, for the record.

    Raises:
        PlanError: if the student's features do not vary.
    """
    change = contrast(pairs)
    record = {"contrast": {"factor": round(float(change.factor.mean()), 4), "photos": photos}}
    return stretched(state, norm, change), record


@torch.no_grad()
def stretched(state: dict[str, Tensor], norm: str, change: Contrast) -> dict[str, Tensor]:
    """Weights whose features are factor f + shift, by their names in timm.

    Only the final norm changes, whose output is affine in its weights. It applies to class token and registers too.
    """
    weight, bias = (state[f"{norm}.{part}"].float() for part in ("weight", "bias"))
    factor, shift = (value.to(bias) for value in change)
    return state | {f"{norm}.weight": factor * weight, f"{norm}.bias": factor * bias + shift}
