"""The model of the neural field: F as a hash grid with an MLP, G as a table, h as an MLP; and the published losses."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denoising_vit.decomposition.options import NeuralFieldOptions, Recipe

#: Number of positions to compute at once outside the fit.
_CHUNK = 16_384

#: Standard deviation of the initial G in the released recipe.
_RELEASED_DEVIATION = 0.02

#: Factor of y in the spatial hash; that of x is 1 (Müller et al., equation 4).
_PRIME = 2_654_435_761

#: Entries are initialised uniformly within this distance of zero.
_INITIAL = 1e-4


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


class NeuralModel(nn.Module):
    """F, G and h of one image on a grid of h w positions; G (h w, C) is not fitted if it is given."""

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


class HashGrid(nn.Module):
    """Features of points in [0, 1]^2, interpolated bilinearly between grid vertices at several resolutions.

    Müller et al., Instant Neural Graphics Primitives (2022), section 3, in two dimensions.

    A level of ``n`` vertices per side has its outermost vertices on the edges of the square. Levels whose vertices fit
    into the table have one entry per vertex; other levels share entries by a hash of the vertex.

    The released recipe has the levels of tiny-cuda-nn: with scale ``s = coarsest b^l - 1``, a position x is at ``s x +
    0.5``, so up to half a cell at the right and lower edge is outside the ``ceil(s) + 1`` vertices, where the
    neighbours are the first vertices of the next row (or of the level); the number of entries per level is a multiple
    of 8.

    Args:
        levels: number of resolutions, growing geometrically.
        coarsest: vertices per side of the first level.
        finest: vertices per side of the last level.
        channels: number of features per entry.
        table_size: maximum number of entries per level.
        sparse: return the table's gradient in sparse form; see :meth:`densify_gradient`.
        released: place the vertices as in tiny-cuda-nn.
    """

    scales: Tensor
    offsets: Tensor
    sides: Tensor
    sizes: Tensor
    dense: Tensor

    def __init__(
        self,
        *,
        levels: int,
        coarsest: int,
        finest: int,
        channels: int,
        table_size: int,
        sparse: bool = False,
        released: bool = False,
    ) -> None:
        super().__init__()
        if released:
            scales = released_scales(levels, coarsest, finest)
            sides = [math.ceil(scale) + 1 for scale in scales]
            sizes = [min(-(-side * side // 8) * 8, table_size) for side in sides]
        else:
            sides = level_sides(levels, coarsest, finest)
            scales = [side - 1.0 for side in sides]
            sizes = [min(side * side, table_size) for side in sides]
        self.channels = channels
        self.sparse = sparse
        self.released = released
        self.table = nn.Parameter(torch.empty(sum(sizes), channels).uniform_(-_INITIAL, _INITIAL))
        self.register_buffer("scales", torch.tensor(scales), persistent=False)
        self.register_buffer("sides", torch.tensor(sides), persistent=False)
        self.register_buffer("sizes", torch.tensor(sizes), persistent=False)
        self.register_buffer("offsets", torch.tensor([0, *sizes[:-1]]).cumsum(0), persistent=False)
        self.register_buffer("dense", torch.tensor([side * side <= table_size for side in sides]), persistent=False)
        self._gradient: Tensor | None = None

    @property
    def width(self) -> int:
        """Number of features of a point: levels x channels."""
        return len(self.sides) * self.channels

    def forward(self, coords: Tensor) -> Tensor:
        """Features (N, levels x channels) at coords (N, 2), (x, y) clamped to [0, 1]."""
        entries, weights = self.corners(coords)
        features = F.embedding_bag(
            entries.flatten(0, 1), self.table, per_sample_weights=weights.flatten(0, 1), mode="sum", sparse=self.sparse
        )  # (N levels, 4) -> (N levels, channels)
        return features.view(len(coords), self.width)

    def corners(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        """Table indices of the vertices around each point and their bilinear weights, both (N, levels, 4).

        The corners are in the order (x0, y0), (x1, y0), (x0, y1), (x1, y1).
        """
        place = coords.to(self.table.dtype).clamp(0, 1)[:, None, :] * self.scales[:, None]  # (N, levels, 2)
        if self.released:
            place = place + 0.5
            lower = place.floor()
        else:
            lower = place.floor().minimum(self.scales[:, None] - 1.0)
        share = place - lower
        (x, y), (sx, sy) = lower.long().unbind(-1), share.unbind(-1)  # (N, levels) each
        weights = torch.stack([(1 - sx) * (1 - sy), sx * (1 - sy), (1 - sx) * sy, sx * sy], -1)
        xs, ys = torch.stack([x, x + 1, x, x + 1], -1), torch.stack([y, y, y + 1, y + 1], -1)
        return self._entries(xs, ys), weights

    def _entries(self, x: Tensor, y: Tensor) -> Tensor:
        """Rows of the table for vertices (N, levels, 4)."""
        in_order = (y * self.sides[:, None] + x) % self.sizes[:, None]  # released: may be past the last vertex
        hashed = (x ^ (y * _PRIME)) % self.sizes[:, None]
        return torch.where(self.dense[:, None], in_order, hashed) + self.offsets[:, None]

    def densify_gradient(self) -> None:
        """Convert the table's sparse gradient to a dense one, in memory that is reused in every step.

        Autograd would allocate and clear a new gradient of the table's size in every step, which takes longer on a CPU
        than the rest of the step.
        """
        sparse = self.table.grad
        if sparse is None or not sparse.is_sparse:
            return
        if self._gradient is None:
            self._gradient = torch.zeros_like(self.table)
        entries, values = sparse._indices()[0], sparse._values()
        self._gradient.zero_()
        if self._gradient.is_cuda:
            self._gradient.index_put_((entries,), values, accumulate=True)  # sorts first: deterministic
        else:
            self._gradient.index_add_(0, entries, values)
        self.table.grad = self._gradient


def released_scales(levels: int, coarsest: int, finest: int) -> list[float]:
    """Cells per side of every level in tiny-cuda-nn, ``coarsest b^l - 1``, rounded to float32 as there.

    The rounding matters: 16 levels from 16 to 1024 end slightly above 1023 cells, so at 1,025 vertices, which no longer
    fit into a table of 2^20.
    """
    growth = np.float32(math.exp(math.log(finest / coarsest) / max(levels - 1, 1)))
    factors = np.exp2(np.arange(levels, dtype=np.float32) * np.log2(growth))
    return (factors * np.float32(coarsest) - np.float32(1)).tolist()


def level_sides(levels: int, coarsest: int, finest: int) -> list[int]:
    """Vertices per side of every level: ``floor(coarsest b^l)``, with b such that the last level has ``finest``."""
    growth = math.log(finest / coarsest) / max(levels - 1, 1)
    # The small addend prevents rounding errors from flooring whole-number powers to the number below.
    return [math.floor(coarsest * math.exp(growth * level) + 1e-6) for level in range(levels)]
