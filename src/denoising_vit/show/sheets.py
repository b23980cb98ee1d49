"""Features of photos by name, and sheets of feature maps in shared colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from denoising_vit.artifact import NONE
from denoising_vit.backbones import Backbone
from denoising_vit.data.pictures import Picture, drawable
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.decomposition.result import Decomposition
from denoising_vit.denoise import Denoising
from denoising_vit.errors import FormatError
from denoising_vit.extractors import KINDS, Cleaners
from denoising_vit.files import atomic_path
from denoising_vit.maps import Clusters, NormScale, Palette, PCABasis, similarity_maps
from denoising_vit.maps.canvas import FORMATS
from denoising_vit.maps.colours import SIMILARITY_BAR
from denoising_vit.maps.features import Bar
from denoising_vit.maps.kinds import MAP_KINDS, SIMILARITY
from denoising_vit.maps.sheet import Sheet
from denoising_vit.progress import OnProgress
from denoising_vit.show.options import ShowOptions
from denoising_vit.tiling.denoising import TiledDenoising, denoise_picture, denoising_of, open_for
from denoising_vit.tiling.layout import TileOptions


@dataclass(frozen=True, eq=False)
class ShownPhoto:
    """A photo and its features."""

    name: str
    pixels: np.ndarray  # (H, W, 3) uint8
    found: dict[str, Decomposition]  # by name of the features

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.pixels.shape[1] / self.pixels.shape[0]

    def maps(self, upsample: int = 1) -> dict[str, Tensor]:
        """Features (h, w, C) by name, with clean features upsampled by this factor."""
        return {
            name: result.raw if not cleans(name) else result.semantic if upsample == 1 else result.upsample(upsample)
            for name, result in self.found.items()
        }


class PhotoExtractor:
    """Extractor of several kinds of features from photos.

    Args:
        backbone: the backbone.
        names: names of features, of :data:`~denoising_vit.extractors.KINDS`.
        cleaners: the cleaners to use; loaded once, here.
        options: options of stage 1; the size applies to all features.
        tiling: tiling of photos larger than the backbone's input.

    Raises:
        DenoisingVitError: as in :meth:`Cleaners.extractor`, or if size or views do not fit.
    """

    def __init__(
        self,
        backbone: Backbone,
        names: Sequence[str],
        cleaners: Cleaners,
        options: DenoiseOptions,
        tiling: TileOptions = TileOptions(),  # noqa: B008, frozen
    ) -> None:
        self.backbone, self.names, self._max_pixels = backbone, tuple(names), tiling.max_pixels
        made = {name: _denoising(name, backbone, cleaners, options, tiling) for name in names}
        # Raw features come with all other features of this backbone and need no forward pass of their own.
        sharing = next((name for name in names if name != "raw" and made[name].backbone is backbone), None)
        self._raw_from = sharing or "raw"
        self._made = {name: one for name, one in made.items() if name != "raw" or sharing is None}
        #: Forward passes for one photo, or for one tile.
        self.passes = sum(one.work for one in self._made.values())

    def open(self, photo: Path) -> Picture:
        """Open a photo, which tiling may read region by region; PhotoError if it cannot be read, or is too large."""
        return open_for(next(iter(self._made.values())), photo, self._max_pixels)

    def __call__(self, picture: Picture, *, name: str = "photo", progress: OnProgress = lambda *_: None) -> ShownPhoto:
        """The features of a photo (H, W, 3) uint8; DenoisingVitError if the photo cannot be used."""
        found: dict[str, Decomposition] = {}
        before = 0
        for feature, denoising in self._made.items():

            def advance(done: int, total: int, each: int = denoising.work, start: int = before) -> None:
                tiles = total // each
                progress(start * tiles + done, self.passes * tiles)

            found[feature] = denoise_picture(denoising, picture, progress=advance)
            before += denoising.work
        kept = {each: found[self._raw_from if each == "raw" else each] for each in self.names}
        return ShownPhoto(name, drawable(picture), kept)


def cleans(name: str) -> bool:
    """True for clean features, including the neural field, which is not in ``KINDS``."""
    return name not in KINDS or KINDS[name].cleans


def _denoising(
    name: str, backbone: Backbone, cleaners: Cleaners, options: DenoiseOptions, tiling: TileOptions
) -> Denoising | TiledDenoising:
    kind = KINDS[name]
    if not kind.cleans:
        return denoising_of(backbone, replace(options, method="subtract"), Cleaners(artifact=NONE), tiling)
    own = Cleaners() if kind.uses is None else Cleaners(**{kind.uses: getattr(cleaners, kind.uses)})
    return denoising_of(backbone, replace(options, method=name), own, tiling)


class DrawnMap(NamedTuple):
    """A map (h, w, 3) uint8 with one pixel per patch, and its colour bar."""

    pixels: np.ndarray
    bar: Bar | None = None


def pictures(photo: ShownPhoto, palette: Palette, options: ShowOptions) -> dict[str, dict[str, DrawnMap | None]]:
    """All maps of a photo by kind and features; None if features do not have such a map.

    Raises:
        ValueError: if features are not finite, or the palette has another number of channels.
    """
    maps = photo.maps(options.upsample)
    drawn: dict[str, dict[str, DrawnMap | None]] = {}
    for kind in options.kinds():
        if kind in ("artifact", "artifact-norm", "residual"):
            drawn[kind] = _removed(kind, photo)
        elif kind == SIMILARITY:
            height, width = next(iter(maps.values())).shape[:2]
            at = min(int(options.at[0] * height), height - 1), min(int(options.at[1] * width), width - 1)
            similar = similarity_maps(*maps.values(), at=at)
            drawn[kind] = {name: DrawnMap(pixels, SIMILARITY_BAR) for name, pixels in zip(maps, similar, strict=True)}
        else:
            bar = palette.bar(kind)
            drawn[kind] = {name: DrawnMap(palette.colours(kind, one), bar) for name, one in maps.items()}
    return drawn


def _removed(kind: str, photo: ShownPhoto) -> dict[str, DrawnMap | None]:
    """G, its norm, or the norm of the residual, in their own colours because they are much smaller than features."""
    cleaned = {name: result for name, result in photo.found.items() if cleans(name)}
    parts = {name: result.residual if kind == "residual" else result.artifact for name, result in cleaned.items()}
    # A denoiser does not separate G from the residual: its G is zero, and not drawn.
    parts = {name: part for name, part in parts.items() if kind == "residual" or bool(part.any())}
    drawn: dict[str, DrawnMap | None] = dict.fromkeys(photo.found)
    if parts:
        colours = (PCABasis if kind == "artifact" else NormScale).fit(*parts.values())
        bar = colours.bar if isinstance(colours, NormScale) else None
        drawn |= {name: DrawnMap(colours.colours(part), bar) for name, part in parts.items()}
    return drawn


def palette_of(
    photos: Sequence[ShownPhoto], options: ShowOptions, backbone: dict[str, object] | None = None
) -> Palette:
    """The colours shared by all features of these photos."""
    maps = [features for photo in photos for features in photo.maps().values()]
    drawn = "kmeans" in options.kinds()
    fitted = {"clusters": Clusters.fit(*maps, clusters=options.clusters)} if drawn else {}
    return Palette(maps, fitted=fitted, backbone=backbone)


def draw_sheet(
    photos: Sequence[ShownPhoto],
    palettes: Sequence[Palette],
    path: str | Path,
    options: ShowOptions,
    *,
    caption: Sequence[str] = (),
    suffix: str | None = None,
) -> None:
    """Draw photos and their feature maps as a PNG, PDF or SVG.

    With one kind of map, each photo is a row, with its features in columns. With several kinds, each photo is a block,
    with one row per kind of features and its maps in columns.

    Args:
        photos: one or more photos with the same features.
        palettes: colours of each photo; repeat a palette to share it.
        path: the output file.
        options: which maps to draw.
        caption: lines at the bottom.
        suffix: .png, .pdf or .svg; defaults to the suffix of the path.

    Raises:
        FormatError: if the suffix is not one of these.
        ValueError: if features are not finite.
        OSError: if the file cannot be written.
    """
    suffix = (suffix or Path(path).suffix).lower()
    if suffix not in FORMATS:
        raise FormatError(f"{path}: expected a name that ends in {', '.join(FORMATS)}")
    kinds, names = options.kinds(), list(photos[0].found)
    single = len(kinds) == 1
    each, columns = (1, len(names)) if single else (len(names), len(kinds))
    aspects = [photo.aspect for photo in photos for _ in range(each)]
    sheet = Sheet(aspects, 1 + columns, MAP_KINDS[kinds[0]].title if single else None)
    rings = {kind: options.at if kind == SIMILARITY else None for kind in kinds}
    for block, (photo, palette) in enumerate(zip(photos, palettes, strict=True)):
        drawn = pictures(photo, palette, options)
        sheet.photo(block * each, photo.pixels, photo.name, rings.get(SIMILARITY))
        for row, name in enumerate(names):
            if not single:
                sheet.row_label(block * each + row, name)
            for column, kind in enumerate(kinds):
                if picture := drawn[kind][name]:
                    place = (block, 1 + row) if single else (block * each + row, 1 + column)
                    heading = name if single else MAP_KINDS[kind].title
                    sheet.picture(*place, picture.pixels, heading, ring=rings[kind], bar=picture.bar)
    sheet.caption(*caption)
    with atomic_path(Path(path)) as temporary:
        sheet.save(temporary, suffix)
