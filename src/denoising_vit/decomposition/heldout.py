"""How well field and artifact predict views that were left out of the fit."""

from __future__ import annotations

import torch
from torch import Tensor

from denoising_vit.views import ViewPlan


class HeldOut:
    """Accumulates R^2 and cosine of ``Wy F Wx^T + G`` over views, batch by batch.

    Args:
        field: F, (Ry, Rx, C).
        artifact: G, (h, w, C).
        plan: the left-out views.
    """

    def __init__(self, field: Tensor, artifact: Tensor, plan: ViewPlan) -> None:
        self._field, self._artifact = field, artifact
        self._weights = tuple(weight.to(field) for weight in plan.weights)
        self._sum = torch.zeros_like(field[0, 0])
        self._squares = self._error = self._cosine = 0.0
        self._views = self._tokens = 0

    def add(self, features: Tensor) -> None:
        """Takes the features (B, h, w, C) of the next B views."""
        wy, wx = (weight[self._views : self._views + len(features)] for weight in self._weights)
        truth = features.to(self._field.device).to(self._field.dtype)
        predicted = torch.einsum("vyr,rsc,vxs->vyxc", wy, self._field, wx) + self._artifact
        self._sum += truth.sum((0, 1, 2))
        self._squares += float(truth.square().sum())
        self._error += float((truth - predicted).square().sum())
        self._cosine += float(torch.cosine_similarity(truth, predicted, dim=-1).sum())
        self._views += len(features)
        self._tokens += truth[..., 0].numel()

    @property
    def r2(self) -> float | None:
        """Share of the variance (about each channel's mean) that is predicted; None where there is no variance."""
        variation = self._squares - float(self._sum.square().sum()) / max(self._tokens, 1)
        return 1 - self._error / variation if variation > 1e-12 * self._squares else None

    @property
    def cosine(self) -> float | None:
        """Mean cosine over all tokens; None before any view came."""
        return self._cosine / self._tokens if self._tokens else None
