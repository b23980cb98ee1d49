"""Features of a large picture on one grid, blended from its tiles: offsets that align tiles, and the size of seams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.sparse import coo_array, diags_array
from scipy.sparse.linalg import splu
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.data.pictures import Picture, open_picture
from denoising_vit.errors import EvaluationError, PlanError
from denoising_vit.extractors import Extractor
from denoising_vit.progress import OnProgress
from denoising_vit.tiling.layout import TileLayout, TileOptions
from denoising_vit.views.rendering import resampling_matrix, to_image

#: Weight of the penalty on offsets, relative to the mean number of patches that a tile shares.
_RIDGE = 0.01


@torch.no_grad()
def tiled_features(
    extractor: Extractor,
    picture: str | Path | Image.Image | np.ndarray,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    align: bool = True,
    size: tuple[int, int] | None = None,
    max_pixels: int = TileOptions.max_pixels,
    backbone: Backbone | None = None,
    progress: OnProgress | None = None,
) -> Tensor:
    """Features of a picture larger than the backbone's input, on one seamless grid.

    The picture is divided into overlapping tiles, each tile goes through the extractor separately, and neighbouring
    tiles are blended with weights that fall to zero at their ends. Besides the result and the decoded picture, memory
    is that of one tile. Each tile is a whole image to the extractor, so its features depend on nothing outside the
    tile.

    Args:
        extractor: any callable (B, 3, H, W) -> (B, h, w, C): a backbone, or a one-pass cleaner.
        picture: a path, a PIL image, or an (H, W, 3) uint8 array. A TIFF file of more than 100 million pixels is read
            tile by tile (extra `tiff`); all other files are decoded as a whole, 3 bytes per pixel.
        tile: side of a tile in pixels; defaults to the backbone's default size.
        overlap: minimum number of pixels shared by neighbouring tiles, up to half a tile; defaults to a quarter. 0
            takes every patch from the nearest tile, which causes seams.
        align: shift the features of each tile by a constant, so that neighbours agree in their overlap.
        size: (H, W) to which the picture is resized; defaults to its own. Sides that do not fit the patch grid are
            changed to the nearest valid ones, by less than a patch.
        max_pixels: maximum size; larger pictures raise PhotoError.
        backbone: the extractor's backbone, if the extractor has no attribute ``backbone``.
        progress: called as ``progress(done, total)`` after each tile.

    Returns:
        (H', W', C) float32 on the CPU: one vector per patch of the picture.

    Raises:
        PhotoError: if the picture cannot be read, is too large, or smaller than a patch.
        SizeError: if the tile does not fit the patch grid.
        PlanError: if the overlap is out of range, or the backbone is unknown.
    """
    model = extractor if isinstance(extractor, Backbone) else backbone or getattr(extractor, "backbone", None)
    if not isinstance(model, Backbone):
        raise PlanError("the extractor has no attribute `backbone`, whose patch grid is needed; give backbone=")
    options = TileOptions(model.default_size if tile is None else tile, overlap, align, max_pixels)
    opened = open_picture(picture, size=size, max_pixels=max_pixels)
    rows, columns = layouts(model, opened, options, size)
    return blend(opened, rows, columns, model, lambda image: extractor(image)[0], progress, align=align)


def layouts(
    backbone: Backbone, picture: Picture, options: TileOptions, size: tuple[int, int] | None
) -> tuple[TileLayout, TileLayout]:
    """Tiles along height and width of a picture shown at a size (H, W), by default its own."""
    assert options.tile is not None
    overlap = options.tile // 4 if options.overlap is None else options.overlap
    height, width = picture.shape[:2] if size is None else size
    rows, columns = (
        TileLayout.make(side, options.tile, overlap, backbone.patch_size, backbone.stride) for side in (height, width)
    )
    return rows, columns


def blend(
    picture: Picture,
    rows: TileLayout,
    columns: TileLayout,
    backbone: Backbone,
    run: Callable[[Tensor], Tensor],
    progress: OnProgress | None = None,
    *,
    align: bool = True,
    fixed: slice = slice(0),
) -> Tensor:
    """Features (H', W', C), float32 on the CPU, of all tiles of a picture, each added with its weights.

    ``run`` maps a tile (1, 3, H, W), normalised for the backbone, to (h, w, C). With ``align``, tiles are shifted by
    constants, except in the ``fixed`` channels, so that neighbours agree in their overlap.
    """
    blended = torch.empty(0)
    total = len(rows.starts) * len(columns.starts)
    alignment = Alignment(rows, columns)
    for index in range(total):
        row, column = divmod(index, len(columns.starts))
        features = run(_tile(picture, rows, row, columns, column, backbone)).float().cpu()
        if not len(blended):
            blended = torch.zeros(rows.weights.shape[1], columns.weights.shape[1], features.shape[2])
        alignment.add(row, column, features)
        down, across = rows.patches(row), columns.patches(column)
        weights = np.outer(rows.weights[row, down], columns.weights[column, across])
        blended[down, across] += features * torch.from_numpy(weights)[..., None]
        if progress is not None:
            progress(index + 1, total)
    if align:
        alignment.shift(blended, fixed)
    return blended


def _tile(picture: Picture, rows: TileLayout, row: int, columns: TileLayout, column: int, backbone: Backbone) -> Tensor:
    """One tile, normalised, (1, 3, H, W). Without resizing, these are the picture's own pixels."""
    height, width = picture.shape[:2]
    top, down = _resampling(rows, row, height)
    left, across = _resampling(columns, column, width)
    pixels = to_image(picture[top : top + down.shape[1], left : left + across.shape[1]], backbone.device)
    image = (down.to(pixels) @ (pixels @ across.to(pixels).T)).clamp_(0, 1)  # the cubic kernel overshoots
    return backbone.normalise(image)[None]


def _resampling(layout: TileLayout, index: int, length: int) -> tuple[int, Tensor]:
    """First pixel of a tile along a side of ``length`` pixels, and the weights of its pixels (H, pixels used)."""
    scale = length / layout.side
    start = layout.starts[index] * layout.stride
    return resampling_matrix(start * scale, (start + layout.tile) * scale, length, layout.tile)


class Alignment:
    """Collects the means of tiles in their overlaps, and solves for one offset (C,) per tile.

    Neighbours show the same content in their overlap, so the difference of their means there is caused by the rest of
    each tile, and by the position in the tile. The second part is the same for all neighbours in a direction, and is
    subtracted; otherwise it would add up to a ramp across the picture. Offsets minimise the remaining squared
    differences, weighted by the number of shared patches, plus a small penalty.
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


def seam_ratio(features: Tensor, rows: Sequence[int], columns: Sequence[int]) -> float:
    """Mean norm of steps between neighbouring patches across tile borders, over that of all other steps.

    Args:
        features: (h, w, C).
        rows: every row k with a tile border between rows k and k + 1.
        columns: every column k with a tile border between columns k and k + 1.

    Returns:
        1 without seams, unless the content has edges exactly there; above 1 with seams.

    Raises:
        EvaluationError: if there is no border, or no step elsewhere.
    """
    across, within = [], []
    for dim, borders in ((0, rows), (1, columns)):
        steps = features.diff(dim=dim).norm(dim=-1).movedim(dim, 0)  # (h - 1, w) or (w - 1, h)
        border = torch.zeros(len(steps), dtype=torch.bool)
        border[list(borders)] = True
        across.append(steps[border].flatten())
        within.append(steps[~border].flatten())
    there, elsewhere = torch.cat(across), torch.cat(within)
    if not len(there) or not float(elsewhere.sum()):
        raise EvaluationError("expected at least one tile border, and features that differ between patches elsewhere")
    return float(there.mean() / elsewhere.mean())
