"""Sums over views: the statistics that the exact solver needs, and the accuracy on held-out views.

``b = sum_v (u Wy)_v^T Y_v (t Wx)_v`` and ``g = sum_v (u t^T)_v Y_v``, where u and t are the weights of the view's patch
rows and columns, are accumulated view by view, so that raw features are never stored. ``s_v = u_v^T Y_v t_v`` is the
weighted sum over each view.
"""

from __future__ import annotations

import torch
from torch import Tensor

from denoising_vit.errors import BackboneError
from denoising_vit.views.plan import ViewPlan


class Statistics:
    """Accumulates ``b`` (Ry, Rx, C), ``g`` (h, w, C) and ``s`` (V, C), float64, over the views of a plan.

    Args:
        plan: the views to add.
        channels: C.
        device: device of the features; the sums are on this device, or on the CPU if it has no float64.
        clip: limit the influence of outlier tokens: norms above ``median + clip * MAD`` of their view are scaled down
            to this bound. None disables clipping.
    """

    def __init__(
        self, plan: ViewPlan, channels: int, *, device: torch.device | str = "cpu", clip: float | None = None
    ) -> None:
        if clip is not None and clip <= 0:
            raise ValueError(f"clip must be a positive number of median absolute deviations, got {clip}")
        device = torch.device(device)
        self.plan = plan
        self.clip = clip
        self.views_seen = 0
        self.clipped_tokens = 0
        self._precision = torch.float32 if device.type == "mps" else torch.float64
        self._weights = tuple(weight.to(device, self._precision) for weight in plan.weighted)
        # A crop covers only a part of the field; on a CPU, products with this part take a third of the time.
        self._spans = list(zip(*(_seen_nodes(weight) for weight in plan.weights), strict=True))
        keep = "cpu" if device.type == "mps" else device
        self.b = torch.zeros(*plan.resolution, channels, dtype=torch.float64, device=keep)
        self.g = torch.zeros(*plan.grid, channels, dtype=torch.float64, device=keep)
        self.s = torch.zeros(len(plan), channels, dtype=torch.float64, device=keep)
        self._windows = tuple(window.to(keep) for window in plan.windows)

    def add(self, features: Tensor) -> None:
        """Add the features (B, h, w, C) of the next B views of the plan.

        Raises:
            ValueError: if the shape differs from the plan's, or there are more views than in the plan.
            BackboneError: if a value is not finite.
        """
        self._check(features)
        if self.clip is not None:
            features, count = clip_norms(features, self.clip)
            self.clipped_tokens += count
        index = slice(self.views_seen, self.views_seen + len(features))
        wy, wx = (weight[index] for weight in self._weights)
        features = features.to(self._precision)
        if features.device.type == "cpu":
            for view, rows, columns, (down, across) in zip(features, wy, wx, self._spans[index], strict=True):
                self.b[down, across] += field_products(view[None], rows[None, :, down], columns[None, :, across])
        else:
            # Move first, then convert, because a device without float64 cannot convert.
            self.b += field_products(features, wy, wx).to(self.b.device).to(self.b.dtype)
        features = features.to(self.g.device).to(self.g.dtype)
        rows, columns = (window[index] for window in self._windows)
        if features.device.type == "cpu":
            for view, down, across in zip(features, rows, columns, strict=True):
                self.g.addcmul_(view, torch.outer(down, across)[..., None])
        else:
            self.g += weighted_sum(features, rows, columns)
        self.s[index] = view_sums(features, rows, columns)
        self.views_seen += len(features)

    def _check(self, features: Tensor) -> None:
        expected = (*self.plan.grid, self.g.shape[-1])
        if features.ndim != 4 or tuple(features.shape[1:]) != expected:
            raise ValueError(
                f"expected features of shape (B, {', '.join(map(str, expected))}), got {tuple(features.shape)}"
            )
        if self.views_seen + len(features) > len(self.plan):
            raise ValueError(f"the plan has {len(self.plan)} views, got {self.views_seen + len(features)}")
        require_finite(features)


def _seen_nodes(weights: Tensor) -> list[slice]:
    """For each view, the nodes from the first to the last that it samples; weights (V, n, nodes)."""
    seen = weights.ne(0).any(1).int()  # (V, nodes)
    first, after = seen.argmax(1), seen.shape[1] - seen.flip(1).argmax(1)
    return [slice(start, stop) for start, stop in zip(first.tolist(), after.tolist(), strict=True)]


def require_finite(features: Tensor) -> None:
    """Check that features are finite.

    Raises:
        BackboneError: if a value is not finite.
    """
    if not torch.isfinite(features.sum()) and not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features)).sum())
        raise BackboneError(
            f"{bad} of {features.numel()} feature values are not finite; check the weights, or use dtype float32"
        )


def field_products(features: Tensor, wy: Tensor, wx: Tensor) -> Tensor:
    """``sum_v Wy_v^T Y_v Wx_v``: features (B, h, w, C), wy (B, h, Ry), wx (B, w, Rx) -> (Ry, Rx, C)."""
    views, h, _, channels = features.shape
    wide = wx.transpose(1, 2)[:, None] @ features  # (B, 1, Rx, w) (B, h, w, C) -> (B, h, Rx, C)
    wide = wide.reshape(views * h, wx.shape[2] * channels)
    summed = wy.reshape(views * h, wy.shape[2]).T @ wide  # (Ry, B h) (B h, Rx C): this also sums over views
    return summed.view(wy.shape[2], wx.shape[2], channels)


def weighted_sum(features: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``sum_v (u t^T)_v Y_v`` in one step: features (B, h, w, C), rows (B, h), columns (B, w) -> (h, w, C)."""
    return (features * (rows[:, :, None] * columns[:, None, :])[..., None]).sum(0)


def view_sums(features: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``u_v^T Y_v t_v`` of each view: features (B, h, w, C), rows (B, h), columns (B, w) -> (B, C)."""
    weights = (rows[:, :, None] * columns[:, None, :]).flatten(1)  # (B, h w)
    return (weights[:, None] @ features.flatten(1, 2))[:, 0]  # a tenth of the time of one einsum


def clip_norms(features: Tensor, k: float) -> tuple[Tensor, int]:
    """Scale tokens whose norm exceeds ``median + k MAD`` of their view down to this bound.

    Args:
        features: (B, h, w, C).
        k: maximum number of median absolute deviations above the median.

    Returns:
        The features (B, h, w, C), and the number of scaled tokens.
    """
    norms = features.norm(dim=-1)  # (B, h, w)
    flat = norms.flatten(1)
    median = flat.median(dim=1, keepdim=True).values
    deviation = (flat - median).abs().median(dim=1, keepdim=True).values
    bound = (median + k * deviation)[..., None]  # (B, 1, 1)
    over = norms > bound
    factor = torch.where(over, bound / norms.clamp(min=torch.finfo(norms.dtype).tiny), 1.0)
    return features * factor[..., None], int(over.sum())


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
