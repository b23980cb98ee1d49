"""Fixed sinusoidal position features, for tasks that need positions, which clean features do not contain."""

from __future__ import annotations

import torch
from torch import Tensor

#: Approximate ratio of the longest to the shortest wavelength, as in the original transformer.
TEMPERATURE = 10_000.0


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
