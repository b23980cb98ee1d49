"""Offsets of tiles: surroundings differ between tiles and shift all features; overlaps show by how much."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import coo_array, diags_array
from scipy.sparse.linalg import splu
from torch import Tensor

from denoising_vit.tiling.layout import TileLayout

#: Weight of the penalty on offsets, relative to the mean number of patches that a tile shares.
_RIDGE = 0.01


class Alignment:
    """Collects the means of tiles in their overlaps, and solves for one offset (C,) per tile.

    Neighbours show the same content in their overlap, so the difference of their means there is caused by the rest of
    each tile, and by the position in the tile. The second part is the same for all neighbours in a direction, and is
    subtracted; otherwise it would add up to a ramp across the picture. Offsets minimise the remaining squared
    differences, weighted by the number of shared patches, plus a small penalty.

    Args:
        rows: tiles along the height.
        columns: tiles along the width.
    """

    def __init__(self, rows: TileLayout, columns: TileLayout) -> None:
        self._layouts = rows, columns
        self._means: dict[tuple[int, int, int, bool], Tensor] = {}  # by tile, axis, and if shared with the next tile

    def add(self, row: int, column: int, features: Tensor) -> None:
        """Add the features (h, w, C) of a tile."""
        for axis, (layout, place) in enumerate(zip(self._layouts, (row, column), strict=True)):
            for after in (False, True):
                if shared := _shared(layout, place if after else place - 1):
                    strip = features.narrow(axis, layout.shown - shared if after else 0, shared)
                    self._means[row, column, axis, after] = strip.double().mean((0, 1))

    def shift(self, blended: Tensor, fixed: slice) -> None:
        """Add all tiles' offsets to their blended features (H', W', C), in place, except in ``fixed`` channels."""
        rows, columns = self._layouts
        offsets = self.offsets(blended.shape[2])
        offsets[..., fixed] = 0
        across = torch.from_numpy(columns.weights).T
        for row, of_row in enumerate(offsets):
            down = rows.patches(row)
            blended[down] += torch.from_numpy(rows.weights[row, down])[:, None, None] * (across @ of_row)

    def offsets(self, channels: int) -> Tensor:
        """(tiles along the height, tiles along the width, C) float32; zero if tiles do not overlap."""
        shape = len(self._layouts[0].starts), len(self._layouts[1].starts)
        first, second, weights, wanted = [], [], [], []
        for axis, layout in enumerate(self._layouts):
            tiles = [at for at in np.ndindex(shape) if (*at, axis, True) in self._means]
            if not tiles:
                continue
            nexts = [(row + (axis == 0), column + (axis == 1)) for row, column in tiles]
            differences = torch.stack(
                [
                    self._means[*after, axis, False] - self._means[*at, axis, True]
                    for at, after in zip(tiles, nexts, strict=True)
                ]
            )
            across = self._layouts[1 - axis].shown
            patches = np.array([_shared(layout, at[axis]) * across for at in tiles], np.float64)
            mean = np.average(differences.numpy(), axis=0, weights=patches)
            first += [np.ravel_multi_index(at, shape) for at in tiles]
            second += [np.ravel_multi_index(at, shape) for at in nexts]
            weights.append(patches)
            wanted.append(differences.numpy() - mean)
        if not wanted:
            return torch.zeros(*shape, channels)
        count, weight = shape[0] * shape[1], np.concatenate(weights)
        pairs = np.arange(len(weight))
        steps = coo_array((np.ones(len(weight)), (pairs, first)), (len(weight), count))
        steps = (steps - coo_array((np.ones(len(weight)), (pairs, second)), (len(weight), count))).tocsr()
        normal = steps.T @ diags_array(weight) @ steps
        normal = normal + diags_array(np.full(count, _RIDGE * normal.diagonal().mean()))
        found = splu(normal.tocsc()).solve(steps.T @ (weight[:, None] * np.concatenate(wanted)))
        return torch.from_numpy(found - found.mean(0)).float().view(*shape, channels)


def _shared(layout: TileLayout, index: int) -> int:
    """Number of patches that a tile shares with the next tile; 0 if there is none."""
    if not 0 <= index < len(layout.starts) - 1:
        return 0
    return max(layout.starts[index] + layout.shown - layout.starts[index + 1], 0)
