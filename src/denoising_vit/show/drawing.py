"""The sheet: photos and maps of their features, everything that is compared in the same colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from denoising_vit.errors import FormatError
from denoising_vit.extractors import KINDS
from denoising_vit.files import atomic_path
from denoising_vit.maps import Clusters, NormScale, Palette, PCABasis, similarity_maps
from denoising_vit.maps.norms import NORM_COLOURS
from denoising_vit.maps.sheet import FORMATS, Sheet, shrink
from denoising_vit.maps.similarity import SIMILARITY_COLOURS
from denoising_vit.show.gathering import ShownPhoto
from denoising_vit.show.options import MAPS, ShowOptions

#: Where a picture comes with a colour bar: the colours, and the values at its ends.
Bar = tuple[str, tuple[float, float]]


@dataclass(frozen=True, eq=False)
class Picture:
    """One map as it is drawn.

    Attributes:
        pixels: (h, w, 3) uint8, a pixel for each patch.
        bar: its colour bar, if it has one.
    """

    pixels: np.ndarray
    bar: Bar | None = None


def pictures(photo: ShownPhoto, palette: Palette, options: ShowOptions) -> dict[str, dict[str, Picture | None]]:
    """All maps of a photo: by kind, then by the names of features; None where features have no such map.

    Args:
        photo: and its features.
        palette: the colours of all features that are compared.
        options: which maps, and how.

    Raises:
        ValueError: if features are not finite, or of other channels than the palette.
    """
    maps = photo.maps(options.upsample)
    return {kind: _of_kind(kind, photo, maps, palette, options) for kind in options.kinds()}


def _of_kind(
    kind: str, photo: ShownPhoto, maps: Mapping[str, Tensor], palette: Palette, options: ShowOptions
) -> dict[str, Picture | None]:
    if kind in ("artifact", "artifact-norm", "residual"):
        return _taken_away(kind, photo)
    if kind == "similarity":
        height, width = next(iter(maps.values())).shape[:2]
        at = min(int(options.at[0] * height), height - 1), min(int(options.at[1] * width), width - 1)
        found = similarity_maps(*maps.values(), at=at)
        return {name: Picture(pixels, (SIMILARITY_COLOURS, (-1, 1))) for name, pixels in zip(maps, found, strict=True)}
    bar = (NORM_COLOURS, (palette.norms.low, palette.norms.high)) if kind == "norm" else None
    return {name: Picture(palette.colours(kind, features), bar) for name, features in maps.items()}


def _taken_away(kind: str, photo: ShownPhoto) -> dict[str, Picture | None]:
    """G, its norm or the residual's, on a scale of its own, because they are small beside the features."""
    cleaned = {name: result for name, result in photo.found.items() if KINDS[name].cleans}
    parts = {name: result.residual if kind == "residual" else result.artifact for name, result in cleaned.items()}
    # A denoiser does not tell G from what else it takes away: its G is zero, and no picture.
    parts = {name: part for name, part in parts.items() if kind == "residual" or bool(part.any())}
    drawn: dict[str, Picture | None] = dict.fromkeys(photo.found)
    if not parts:
        return drawn
    if kind == "artifact":
        basis = PCABasis.fit(*parts.values())
        return drawn | {name: Picture(basis.colours(part)) for name, part in parts.items()}
    scale = NormScale.fit(*parts.values())
    bar = NORM_COLOURS, (scale.low, scale.high)
    return drawn | {name: Picture(scale.colours(part), bar) for name, part in parts.items()}


def palette_of(
    photos: Sequence[ShownPhoto], options: ShowOptions, backbone: dict[str, object] | None = None
) -> Palette:
    """The colours that all features of these photos share."""
    maps = [features for photo in photos for features in photo.maps().values()]
    return Palette(maps, fitted=_asked_for(maps, options), backbone=backbone)


def _asked_for(maps: Sequence[Tensor], options: ShowOptions) -> dict[str, Clusters]:
    """As many clusters as were asked for, where k-means is drawn."""
    return {"clusters": Clusters.fit(*maps, clusters=options.clusters)} if "kmeans" in options.kinds() else {}


def draw_sheet(
    photos: Sequence[ShownPhoto],
    palettes: Sequence[Palette],
    path: str | Path,
    options: ShowOptions,
    *,
    caption: Sequence[str] = (),
    suffix: str | None = None,
) -> None:
    """Draws photos and maps of their features as a PNG, PDF or SVG.

    Of one kind of map, each photo is a row, with its features beside each other. Of several, each photo is a block,
    with its maps beside each other and a row for each kind of features.

    Args:
        photos: one or more, with the same features.
        palettes: the colours of each photo; the same one again and again where they share it.
        path: the file; its ending says which kind.
        options: which maps, and how.
        caption: lines at the bottom.
        suffix: .png, .pdf or .svg, where the path does not end in it.

    Raises:
        FormatError: if the path ends in none of .png, .pdf, .svg.
        ValueError: if features are not finite.
        OSError: if the file cannot be written.
    """
    suffix = (suffix or Path(path).suffix).lower()
    if suffix not in FORMATS:
        raise FormatError(f"{path}: expected a name that ends in {', '.join(FORMATS)}")
    kinds, names = options.kinds(), list(photos[0].found)
    sheet = _rows(photos, palettes, options) if len(kinds) == 1 else _blocks(photos, palettes, options, names)
    sheet.caption(*caption)
    with atomic_path(Path(path)) as temporary:
        sheet.save(temporary, suffix)


def _rows(photos: Sequence[ShownPhoto], palettes: Sequence[Palette], options: ShowOptions) -> Sheet:
    (kind,) = options.kinds()
    sheet = Sheet([photo.aspect for photo in photos], 1 + len(photos[0].found), MAPS[kind])
    for row, (photo, palette) in enumerate(zip(photos, palettes, strict=True)):
        ring = options.at if kind == "similarity" else None
        sheet.picture(row, 0, shrink(photo.pixels, sheet.box(row)), photo.name, ring)
        for column, (name, picture) in enumerate(pictures(photo, palette, options)[kind].items(), 1):
            _draw(sheet, row, column, picture, name, ring)
    return sheet


def _blocks(
    photos: Sequence[ShownPhoto], palettes: Sequence[Palette], options: ShowOptions, names: Sequence[str]
) -> Sheet:
    kinds = options.kinds()
    sheet = Sheet([photo.aspect for photo in photos for _ in names], 1 + len(kinds))
    for block, (photo, palette) in enumerate(zip(photos, palettes, strict=True)):
        found = pictures(photo, palette, options)
        first = block * len(names)
        ring = options.at if "similarity" in kinds else None
        sheet.picture(first, 0, shrink(photo.pixels, sheet.box(first)), photo.name, ring)
        for row, name in enumerate(names, first):
            sheet.row_label(row, name)
            for column, kind in enumerate(kinds, 1):
                ringed = options.at if kind == "similarity" else None
                _draw(sheet, row, column, found[kind][name], MAPS[kind], ringed)
    return sheet


def _draw(
    sheet: Sheet, row: int, column: int, picture: Picture | None, heading: str, ring: tuple[float, float] | None
) -> None:
    if picture is None:
        return
    sheet.picture(row, column, picture.pixels, heading, ring)
    if picture.bar is not None:
        sheet.bar(row, column, *picture.bar)
