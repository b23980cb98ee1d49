"""Options for dividing a large picture into tiles."""

from __future__ import annotations

from dataclasses import dataclass

from denoising_vit.errors import PlanError


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
