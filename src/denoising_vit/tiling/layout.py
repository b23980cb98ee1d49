"""Where tiles lie along one side of a picture, and how much each adds to each patch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from denoising_vit.views.patch_grid import check_side, nearest_sizes, patch_count


@dataclass(frozen=True, eq=False)
class TileLayout:
    """The tiles along one side.

    Attributes:
        side: pixels of the side as shown, which fit the patch grid.
        tile: pixels of a tile.
        stride: pixels between neighbouring patches.
        starts: first patch of each tile, increasing.
        shown: patches of a tile.
        weights: (tiles, patches of the side) float32; zero where a tile does not reach, and every patch's sum is one.
        seams: every patch k such that patches k and k + 1 are nearest to different tiles.
    """

    side: int
    tile: int
    stride: int
    starts: tuple[int, ...]
    shown: int
    weights: np.ndarray
    seams: tuple[int, ...]

    @classmethod
    def make(cls, side: int, tile: int, overlap: int, patch: int, stride: int) -> TileLayout:
        """Spread as few tiles as the overlap allows evenly over a side.

        Args:
            side: pixels of the side. If they do not fit the patch grid, the nearest number that does is taken.
            tile: pixels of a tile; one tile of the whole side if that is shorter.
            overlap: least pixels that neighbours share, up to half a tile.
            patch: side of a patch in pixels.
            stride: pixels between neighbouring patches.

        Raises:
            SizeError: if the tile does not fit the patch grid.
        """
        check_side(tile, patch, stride)
        side = min(nearest_sizes(side, patch, stride), key=lambda fitting: abs(fitting - side))
        tile = min(tile, side)
        patches, shown = patch_count(side, patch, stride), patch_count(tile, patch, stride)
        shared = min(round(overlap / stride), shown // 2)
        count = 1 + math.ceil((patches - shown) / (shown - shared))
        starts = tuple(np.linspace(0, patches - shown, count).round().astype(int).tolist())
        depth = _depth(starts, shown, patches)
        nearest = depth.argmax(0)
        if shared:  # sin^2 starts and ends level, so that neither end of the ramp shows
            weights = np.sin(np.clip(depth / shared, 0, 1) * (np.pi / 2)) ** 2
            weights /= weights.sum(0)
        else:
            weights = np.arange(count)[:, None] == nearest
        return cls(
            side, tile, stride, starts, shown, weights.astype("f4"), tuple(np.flatnonzero(np.diff(nearest)).tolist())
        )

    def patches(self, index: int) -> slice:
        """The patches of a tile."""
        return slice(self.starts[index], self.starts[index] + self.shown)


def _depth(starts: tuple[int, ...], shown: int, patches: int) -> np.ndarray:
    """How far every patch's centre lies within each tile, in patches: (tiles, patches), zero outside.

    An end of a tile at an end of the side is none: nothing lies beyond it.
    """
    centres = np.arange(patches) + 0.5
    left = centres - np.array([-np.inf, *starts[1:]])[:, None]
    right = np.array([*starts[:-1], np.inf])[:, None] + shown - centres
    return np.minimum(np.minimum(left, right), patches).clip(0)
