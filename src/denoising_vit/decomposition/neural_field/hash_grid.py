"""Multi-resolution hash grid in two dimensions (Müller et al., Instant Neural Graphics Primitives, 2022, section 3)."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Factors of the spatial hash of x and y (the same source, equation 4).
_PRIME = 2_654_435_761

#: Entries begin uniform within this of zero.
_INITIAL = 1e-4


class HashGrid(nn.Module):
    """Features of points in [0, 1]^2, interpolated bilinearly between grid vertices at several resolutions.

    A level of ``n`` vertices along each side has its outermost vertices on the edges of the square. Levels whose
    vertices fit the table have one entry each; others share entries by a hash of the vertex.

    The released recipe has the levels of tiny-cuda-nn: of scale ``s = coarsest b^l - 1``, a place x lies at ``s x +
    0.5``, so that up to half a cell at the right and lower edge lies beyond the ``ceil(s) + 1`` vertices, whose
    neighbours there are the first of the next row (or of the level); the entries of a level are a multiple of 8.

    Args:
        levels: how many resolutions, growing geometrically.
        coarsest: vertices along each side of the first.
        finest: vertices along each side of the last.
        channels: features of an entry.
        table_size: most entries of a level.
        sparse: give the table's gradient in sparse form; see :meth:`densify_gradient`.
        released: place the vertices as tiny-cuda-nn does.
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
        in_order = (y * self.sides[:, None] + x) % self.sizes[:, None]  # released places lie beyond the last vertex
        hashed = (x ^ (y * _PRIME)) % self.sizes[:, None]
        return torch.where(self.dense[:, None], in_order, hashed) + self.offsets[:, None]

    def densify_gradient(self) -> None:
        """Turn the table's sparse gradient into a dense one, in memory that is reused in every step.

        Autograd would allocate and clear a new gradient as large as the table in every step, which takes longer on a
        CPU than everything else in the step.
        """
        sparse = self.table.grad
        if sparse is None or not sparse.is_sparse:
            return
        if self._gradient is None:
            self._gradient = torch.zeros_like(self.table)
        entries, values = sparse._indices()[0], sparse._values()
        self._gradient.zero_()
        if self._gradient.is_cuda:
            self._gradient.index_put_((entries,), values, accumulate=True)  # sorts first: the same sum every time
        else:
            self._gradient.index_add_(0, entries, values)
        self.table.grad = self._gradient


def released_scales(levels: int, coarsest: int, finest: int) -> list[float]:
    """Cells along each side of every level in tiny-cuda-nn, ``coarsest b^l - 1``, rounded to float32 as there.

    The rounding counts: 16 levels from 16 to 1024 end a little above 1023 cells, so at 1,025 vertices, which no longer
    fit a table of 2^20.
    """
    growth = np.float32(math.exp(math.log(finest / coarsest) / max(levels - 1, 1)))
    factors = np.exp2(np.arange(levels, dtype=np.float32) * np.log2(growth))
    return (factors * np.float32(coarsest) - np.float32(1)).tolist()


def level_sides(levels: int, coarsest: int, finest: int) -> list[int]:
    """Vertices along each side of every level: ``floor(coarsest b^l)``, with b such that the last has ``finest``."""
    growth = math.log(finest / coarsest) / max(levels - 1, 1)
    # A little is added, so that a power that is a whole number is not floored to the one below it.
    return [math.floor(coarsest * math.exp(growth * level) + 1e-6) for level in range(levels)]
