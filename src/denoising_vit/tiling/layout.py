"""Tiles of a large picture: their options, positions and weights. No heavy imports."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from denoising_vit.errors import PlanError
from denoising_vit.views.patch_grid import check_side, nearest_sizes, patch_count


@dataclass(frozen=True)
class TileOptions:
    """Options for dividing a large picture into tiles.

    Attributes:
        tile: divide the picture into square tiles of this many pixels, and blend their features into one grid. Patches
            are those of the original pixels, or of the picture resized to --size. By default, the backbone sees the
            whole photo at once.
        overlap: minimum number of pixels shared by neighbouring tiles, where their features are blended. 0 takes every
            patch from the nearest tile. Defaults to a quarter of a tile.
        align: shift the features of each tile by a constant, so that neighbours agree in their overlap.
        max_pixels: maximum number of pixels of a picture.
    """

    tile: int | None = None
    overlap: int | None = None
    align: bool = True
    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        if self.tile is None and self.overlap is not None:
            raise PlanError(
                f"overlap is {self.overlap} pixels, but there are no tiles; also set tile, the side of a tile in pixels"
            )
        if self.tile is not None and self.tile < 1:
            raise PlanError(f"tile must be at least 1 pixel, got {self.tile}")
        if self.tile is not None and self.overlap is not None and not 0 <= 2 * self.overlap <= self.tile:
            raise PlanError(f"overlap must be 0 to {self.tile // 2} pixels (half a tile), got {self.overlap}")
        if self.max_pixels < 1:
            raise PlanError(f"max_pixels must be at least 1, got {self.max_pixels}")


@dataclass(frozen=True, eq=False)
class TileLayout:
    """The tiles along one side.

    Attributes:
        side: length of the side in pixels, which fits the patch grid.
        tile: length of a tile in pixels.
        stride: distance between neighbouring patches in pixels.
        starts: first patch of each tile, ascending.
        shown: number of patches of a tile.
        weights: (tiles, patches of the side) float32; zero outside a tile; the sum at every patch is one.
        seams: every patch k for which patches k and k + 1 are nearest to different tiles.
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
            side: length of the side in pixels; rounded to the nearest length that fits the patch grid.
            tile: length of a tile in pixels; a shorter side has a single tile.
            overlap: minimum number of pixels shared by neighbours, up to half a tile.
            patch: side of a patch in pixels.
            stride: distance between patches in pixels.

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
        if shared:  # sin^2 is flat at both ends, so that the ramp's ends are invisible
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
    """Distance in patches from every patch's centre to the nearest end of each tile: (tiles, patches), zero outside.

    A tile's end at an end of the side does not count, because there is nothing beyond it.
    """
    centres = np.arange(patches) + 0.5
    left = centres - np.array([-np.inf, *starts[1:]])[:, None]
    right = np.array([*starts[:-1], np.inf])[:, None] + shown - centres
    return np.minimum(np.minimum(left, right), patches).clip(0)
