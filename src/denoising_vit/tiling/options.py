"""How a large picture is cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass

from denoising_vit.errors import PlanError


@dataclass(frozen=True)
class TileOptions:
    """How a large picture is cut into tiles.

    Attributes:
        tile: cut the picture into square tiles of this many pixels, and blend their features into one grid. Its patches
            are those of the original pixels, or of the picture resized to --size. Without it, the whole photo is shown
            to the backbone at once.
        overlap: pixels over which neighbouring tiles overlap, at least; their features are blended there. 0 takes every
            patch from the nearest tile. Without it, a quarter of a tile.
        align: shift the features of each tile by a constant, so that neighbours agree where they overlap.
        max_pixels: largest picture that is read, in pixels.
    """

    tile: int | None = None
    overlap: int | None = None
    align: bool = True
    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        if self.tile is None and self.overlap is not None:
            raise PlanError(f"overlap is {self.overlap} pixels, but there are no tiles: give the side of a tile too")
        if self.tile is not None and self.tile < 1:
            raise PlanError(f"tile must be at least 1 pixel, got {self.tile}")
        if self.tile is not None and self.overlap is not None and not 0 <= 2 * self.overlap <= self.tile:
            raise PlanError(f"overlap must be 0 to {self.tile // 2} pixels, half a tile, got {self.overlap}")
        if self.max_pixels < 1:
            raise PlanError(f"max_pixels must be at least 1, got {self.max_pixels}")
