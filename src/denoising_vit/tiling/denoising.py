"""Denoising of large pictures, tile by tile."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.data.photos import read_photo
from denoising_vit.data.pictures import Picture, open_picture, picture_digest
from denoising_vit.decomposition.methods import UNJUDGED
from denoising_vit.decomposition.neural_field.fit import Evaluation
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.decomposition.result import Decomposition
from denoising_vit.denoise import Denoising
from denoising_vit.errors import PlanError
from denoising_vit.extractors import Cleaners
from denoising_vit.progress import OnProgress
from denoising_vit.tiling.features import blend, layouts
from denoising_vit.tiling.layout import TileOptions
from denoising_vit.views.plan import ViewPlan
from denoising_vit.views.sampling import on_nodes


def denoising_of(
    backbone: Backbone, options: DenoiseOptions, cleaners: Cleaners, tiling: TileOptions
) -> Denoising | TiledDenoising:
    """A denoising method: of whole photos, or of tiles if ``tiling`` has a tile size.

    Raises:
        SizeError, PlanError, ArtifactError, DenoiserError, FormatError: as in :func:`~denoising_vit.denoise_image`.
    """
    if tiling.tile is None:
        return Denoising(backbone, options, cleaners)
    return TiledDenoising(backbone, options, tiling, cleaners)


def open_for(denoising: Denoising | TiledDenoising, photo: Path, max_pixels: int) -> Picture:
    """Open a photo for a method; with tiles, it may be read region by region.

    Raises:
        PhotoError: if it cannot be read or has more pixels.
    """
    if isinstance(denoising, TiledDenoising):
        return open_picture(photo, size=denoising.size, max_pixels=max_pixels)
    return read_photo(photo, max_pixels=max_pixels)


def denoise_picture(
    denoising: Denoising | TiledDenoising,
    picture: Picture,
    *,
    progress: OnProgress | None = None,
    watch: Callable[[Evaluation], None] | None = None,
    digest: str | None = None,
) -> Decomposition:
    """Denoise a picture that :func:`open_for` opened for this method."""
    if isinstance(denoising, TiledDenoising):
        return denoising(picture, progress=progress, watch=watch, digest=digest)
    assert isinstance(picture, np.ndarray)
    return denoising(picture, progress=progress, watch=watch, digest=digest)


class TiledDenoising:
    """A denoising method for pictures of any size: each tile is denoised separately by any method, then blended.

    Args:
        backbone: the backbone.
        options: options for denoising tiles. ``size`` is the (H, W) to which a picture is resized; defaults to its own.
        tiling: options of the tiles.
        cleaners: cleaners of the features; an artifact given as values is on the grid of one tile.

    Attributes:
        whole: the method for a whole tile.
        work: total amount of work for one tile.

    Raises:
        SizeError, PlanError, ArtifactError, DenoiserError, FormatError: as in :func:`~denoising_vit.denoise_image`.
    """

    def __init__(
        self,
        backbone: Backbone,
        options: DenoiseOptions,
        tiling: TileOptions,
        cleaners: Cleaners = Cleaners(),  # noqa: B008, frozen
    ) -> None:
        if tiling.tile is None:
            raise PlanError("tile is not set; expected the side of a tile in pixels")
        self.backbone, self.tiling = backbone, tiling
        self.size = (options.size, options.size) if isinstance(options.size, int) else options.size

        @cache  # a picture narrower than a tile has smaller tiles
        def for_tiles(size: tuple[int, int]) -> Denoising:
            return Denoising(backbone, replace(options, size=size), cleaners)

        self._for_tiles = for_tiles
        self.whole = for_tiles((tiling.tile, tiling.tile))
        self.work = self.whole.work

    def __call__(
        self,
        picture: Picture,
        *,
        progress: OnProgress | None = None,
        watch: Callable[[Evaluation], None] | None = None,
        digest: str | None = None,
    ) -> Decomposition:
        """Denoise a picture; see :class:`~denoising_vit.denoise.Denoising`. Held-out metrics are means over tiles.

        Memory is that of one tile, plus field, artifact and raw features of the whole picture: 12 C bytes per patch.
        """
        started = time.perf_counter()
        digest = digest or picture_digest(picture)
        rows, columns = layouts(self.backbone, picture, self.tiling, self.size)
        denoising = self._for_tiles((rows.tile, columns.tile))
        total = denoising.work * len(rows.starts) * len(columns.starts)
        infos: list[dict[str, Any]] = []

        def advance(done: int, _of_tile: int) -> None:
            if progress is not None:
                progress(denoising.work * len(infos) + done, total)

        def run(tile: Tensor) -> Tensor:
            part = denoising(tile, progress=advance, watch=watch, digest=digest)
            infos.append(part.info)
            return torch.cat([part.semantic, part.artifact, part.raw], dim=-1)

        channels = self.backbone.embed_dim
        artifact_channels = slice(channels, 2 * channels)  # G has mean zero in every tile
        blended = blend(picture, rows, columns, self.backbone, run, align=self.tiling.align, fixed=artifact_channels)
        semantic, artifact, raw = blended.chunk(3, dim=-1)
        height, width = picture.shape[:2]
        info = infos[0] | {key: _mean([each[key] for each in infos]) for key in UNJUDGED}
        info |= {
            "photo": {"name": None, "height": height, "width": width, "sha256": digest},
            "tiles": self._recorded(denoising.fitted),
            "seconds": round(time.perf_counter() - started, 3),
        }
        return Decomposition(
            field=self._on_nodes(semantic, (rows.side, columns.side)),
            artifact=artifact,
            raw=raw,
            size=(rows.side, columns.side),
            patch_size=self.backbone.patch_size,
            stride=self.backbone.stride,
            info=info,
        )

    def made(self, info: dict[str, Any]) -> bool:
        """True if a result with this ``info`` was made with this backbone, these tiles and these settings."""
        tiles = info.get("tiles") or {}
        if not isinstance(size := tiles.get("of"), list):
            return False
        denoising = self._for_tiles((size[0], size[1]))
        return tiles == self._recorded(denoising.fitted) and denoising.made(info | {"tiles": None})

    def _recorded(self, plan: ViewPlan) -> dict[str, Any]:
        size = None if self.size is None else list(self.size)
        found = {"of": list(plan.size), "tile": self.tiling.tile, "overlap": self.tiling.overlap, "size": size}
        if self.tiling.align:  # results of earlier versions are not aligned and have no entry
            found["align"] = True
        return found

    def _on_nodes(self, semantic: Tensor, size: tuple[int, int]) -> Tensor:
        """The field with these values at the patch centres; nodes are patch centres unless patches overlap."""
        patch, stride = self.backbone.patch_size, self.backbone.stride
        if patch == stride:
            return semantic
        return on_nodes(semantic, ViewPlan.make(1, size=size, patch_size=patch, stride=stride))


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
