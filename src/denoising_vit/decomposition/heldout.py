"""Accuracy of field and artifact in predicting held-out views."""

from __future__ import annotations

import torch
from torch import Tensor

from denoising_vit.decomposition.statistics import require_finite
from denoising_vit.views.plan import ViewPlan


class Agreement:
    """Accumulates R^2 and cosine between features and their prediction, batch by batch."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._squares = self._error = self._cosine = 0.0
        self._tokens = 0

    def add(self, truth: Tensor, predicted: Tensor) -> None:
        """Add features and their prediction, both (..., C)."""
        self._sum = self._sum + truth.flatten(0, -2).sum(0)
        self._squares += float(truth.square().sum())
        self._error += float((truth - predicted).square().sum())
        self._cosine += float(torch.cosine_similarity(truth, predicted, dim=-1).sum())
        self._tokens += truth[..., 0].numel()

    @property
    def r2(self) -> float | None:
        """Fraction of the variance (about each channel's mean) that is explained; None without variance."""
        mean_part = float(torch.as_tensor(self._sum).square().sum()) / max(self._tokens, 1)
        variation = self._squares - mean_part
        return 1 - self._error / variation if variation > 1e-12 * self._squares else None

    @property
    def cosine(self) -> float | None:
        """Mean cosine over all tokens; None without tokens."""
        return self._cosine / self._tokens if self._tokens else None


class HeldOut(Agreement):
    """Agreement of ``Wy F Wx^T + G`` with the features of held-out views.

    Args:
        field: F, (Ry, Rx, C).
        artifact: G, (h, w, C).
        plan: the held-out views.
        offsets: add to each prediction the constant that fits the view best, as the solver does for fitted views.
    """

    def __init__(self, field: Tensor, artifact: Tensor, plan: ViewPlan, *, offsets: bool = False) -> None:
        super().__init__()
        self._field, self._artifact, self._offsets = field, artifact, offsets
        self._weights = tuple(weight.to(field) for weight in plan.weights)
        self._views = 0

    def add_views(self, features: Tensor) -> None:
        """Add the features (B, h, w, C) of the next B views.

        Raises:
            BackboneError: if a value is not finite.
        """
        wy, wx = (weight[self._views : self._views + len(features)] for weight in self._weights)
        require_finite(features)
        truth = features.to(self._field.device).to(self._field.dtype)
        predicted = torch.einsum("vyr,rsc,vxs->vyxc", wy, self._field, wx) + self._artifact
        if self._offsets:
            predicted += (truth - predicted).mean((1, 2), keepdim=True)
        self.add(truth, predicted)
        self._views += len(features)
