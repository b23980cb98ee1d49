"""The model of the neural field: F as a hash grid with an MLP, G as a table, h as an MLP; and the published losses."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denoising_vit.decomposition.neural_field.hash_grid import HashGrid
from denoising_vit.decomposition.neural_field.options import NeuralFieldOptions, Recipe


def reconstruction_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error plus (1 - mean cosine) of tokens (N, C)."""
    return F.mse_loss(predicted, target) + 1 - F.cosine_similarity(predicted, target, dim=-1).mean()


def first_phase_loss(semantic: Tensor, artifact: Tensor, features: Tensor) -> Tensor:
    """Loss of F + G against the features; all (N, C)."""
    return reconstruction_loss(semantic + artifact, features)


def second_phase_loss(
    semantic: Tensor,
    artifact: Tensor,
    residual: Tensor,
    features: Tensor,
    residual_weight: float,
    sparsity_weight: float,
    recipe: Recipe = "paper",
) -> Tensor:
    """Loss with h: F fits the features minus h; h, kept small, fits the features minus F and G (frozen). All (N, C).

    No gradient flows from F's error into h, or from h's into F. Both recipes have the same squared error; the released
    one takes the cosine of F + G + h with the features, the paper's that of F + G with the features minus h.
    """
    artifact, given = artifact.detach(), residual.detach()
    if recipe == "released":
        field_loss = reconstruction_loss(semantic + artifact + given, features)
    else:
        field_loss = reconstruction_loss(semantic + artifact, features - given)
    left_over = (features - semantic - artifact).detach()
    residual_loss = residual_weight * F.mse_loss(residual, left_over)
    return field_loss + residual_loss + sparsity_weight * torch.mean(residual.abs())


#: Number of positions to compute at once outside the fit.
_CHUNK = 16_384

#: Standard deviation of the initial G in the released recipe.
_RELEASED_DEVIATION = 0.02


class NeuralModel(nn.Module):
    """F, G and h of one image.

    Args:
        positions: number of positions of the patch grid, h w.
        channels: C.
        options: widths and sizes.
        artifact: G (h w, C), if known; it is then not fitted.
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
