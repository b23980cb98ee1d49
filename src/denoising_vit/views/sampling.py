"""Values at patches: fields sampled there, fields from patch features, and sinusoidal positions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from denoising_vit.views.patch_grid import patch_centres
from denoising_vit.views.plan import ViewPlan, linear_weights

#: Approximate ratio of the longest to the shortest wavelength, as in the original transformer.
TEMPERATURE = 10_000.0


def at_patches(nodes: Tensor, view: ViewPlan) -> Tensor:
    """Sample a field (Ry, Rx, C), on nodes at cell centres, at the patches of a plan with one view: (h, w, C)."""
    rows, columns = view.centres()
    return sample_field(nodes, rows[0], columns[0])


def sample_field(nodes: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """Sample a field (Ry, Rx, C), on nodes at cell centres of [0, 1]^2, at rows (h,) x columns (w,): (h, w, C)."""
    down, across = (
        torch.from_numpy(linear_weights(places, count)).to(nodes)
        for places, count in zip((rows, columns), nodes.shape[:2], strict=True)
    )
    return torch.einsum("yr,rsc,xs->yxc", down, nodes, across)


def on_nodes(features: Tensor, plan: ViewPlan) -> Tensor:
    """The smoothest field on the plan's nodes (Ry, Rx, C) that has given features (h, w, C) at the patch centres.

    Without overlapping patches, and with as many nodes as patches, nodes are the patch centres.
    """
    down, across = (
        _interpolation(patch_centres(side, plan.patch_size, plan.stride), nodes).to(features)
        for side, nodes in zip(plan.size, plan.resolution, strict=True)
    )
    return torch.einsum("ry,yxc,sx->rsc", down, features, across)


def _interpolation(centres: np.ndarray, nodes: int) -> Tensor:
    """(nodes, n): maps values at n positions to the smoothest nodes (least squared differences) that reproduce them."""
    sampled = torch.from_numpy(linear_weights(centres, nodes))  # (n, nodes)
    count = len(sampled)
    if count == nodes and torch.allclose(sampled, torch.eye(count, dtype=sampled.dtype)):
        return torch.eye(count, dtype=sampled.dtype)
    difference = torch.eye(nodes, dtype=sampled.dtype).diff(dim=0)
    # Lagrange: [D^T D, W^T; W, 0] [F; multipliers] = [0; values]
    upper = torch.cat([difference.T @ difference, sampled.T], dim=1)
    lower = torch.cat([sampled, torch.zeros(count, count, dtype=sampled.dtype)], dim=1)
    right = torch.cat([torch.zeros(nodes, count, dtype=sampled.dtype), torch.eye(count, dtype=sampled.dtype)])
    return torch.linalg.solve(torch.cat([upper, lower]), right)[:nodes]


def sinusoidal_positions(
    grid: tuple[int, int], channels: int, *, step: float = 1.0, device: torch.device | str | None = None
) -> Tensor:
    """Sines and cosines of patch positions, (h, w, C) float32, values in [-1, 1].

    A position is that of the patch's centre, from the top left corner of the image, in patch sizes: ``k step + 1/2``.
    With C / 4 frequencies ``TEMPERATURE ** (-i / (C / 4))``, channels are sines of y, cosines of y, sines of x, cosines
    of x, in equal parts, from the shortest to the longest wavelength. The last C mod 4 channels are zero.

    Args:
        grid: (h, w).
        channels: C, at least 4.
        step: distance between neighbouring patches in patch sizes, stride / patch size. A position in the image then
            has the same features on a dense grid as on a plain one.
        device: device of the result; defaults to torch's default.

    Raises:
        ValueError: if there are fewer than 4 channels.
    """
    if channels < 4:
        raise ValueError(f"position features need at least 4 channels, got {channels}")
    waves = channels // 4
    exponents = torch.arange(waves, dtype=torch.float32, device=device) / waves
    frequencies = TEMPERATURE**-exponents
    parts = []
    for axis, side in enumerate(grid):
        places = torch.arange(side, dtype=torch.float32, device=device) * step + 0.5
        phases = places[:, None] * frequencies  # (side, waves)
        phases = phases[:, None] if axis == 0 else phases[None]  # (h, 1, waves), (1, w, waves)
        parts += [phases.sin().expand(*grid, waves), phases.cos().expand(*grid, waves)]
    left_over = torch.zeros(*grid, channels - 4 * waves, device=device)
    return torch.cat([*parts, left_over], dim=-1)
