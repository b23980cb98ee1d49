"""The three parts of the published model of one image's features: F(x), G(p) and h(y)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from denoising_vit.decomposition.neural_field.hash_grid import HashGrid
from denoising_vit.decomposition.neural_field.options import NeuralFieldOptions

#: Places whose features are computed at once outside the fit.
_CHUNK = 16_384

#: Of G at first, in the released recipe.
_RELEASED_DEVIATION = 0.02


class NeuralModel(nn.Module):
    """F, G and h of one image.

    Args:
        positions: of the patch grid, h w.
        channels: C.
        options: widths and sizes.
        artifact: G (h w, C) where it is known; it is not fitted then.
    """

    artifact: Tensor

    def __init__(
        self, positions: int, channels: int, options: NeuralFieldOptions, artifact: Tensor | None = None
    ) -> None:
        super().__init__()
        self.grid = HashGrid(
            levels=options.levels,
            coarsest=options.coarsest,
            finest=options.finest,
            channels=options.level_channels,
            table_size=options.table_size,
            sparse=True,
            released=options.recipe == "released",
        )
        hidden = options.field_hidden or max(channels // 2, 1)
        self.network = nn.Sequential(
            nn.Linear(self.grid.width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, channels)
        )
        self.fits_artifact = artifact is None and options.shared_artifact
        if self.fits_artifact:
            deviation = _RELEASED_DEVIATION if options.recipe == "released" else 0.0
            self.artifact = nn.Parameter(torch.randn(positions, channels) * deviation)
        else:
            known = torch.zeros(positions, channels) if artifact is None else artifact.detach().float().clone()
            self.register_buffer("artifact", known)
        hidden = options.residual_hidden or max(channels // 4, 1)
        self.residual = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels),
        )

    def semantic(self, coords: Tensor) -> Tensor:
        """F (N, C) at coords (N, 2), (x, y) in [0, 1] of the image."""
        return self.network(self.grid(coords))

    @torch.no_grad()
    def semantic_on(self, rows: np.ndarray, columns: np.ndarray) -> Tensor:
        """F on a product grid of image coordinates, (h,) and (w,) -> (h, w, C)."""
        device = self.grid.table.device
        y, x = torch.meshgrid(*(torch.from_numpy(side).float().to(device) for side in (rows, columns)), indexing="ij")
        coords = torch.stack([x, y], -1).flatten(0, 1)  # (h, w, 2) -> (h w, 2)
        return torch.cat([self.semantic(part) for part in coords.split(_CHUNK)]).view(len(rows), len(columns), -1)
