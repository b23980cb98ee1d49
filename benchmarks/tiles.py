"""How visible tile borders are in the features of a large picture.

    python benchmarks/tiles.py [PHOTO | FOLDER] [--size 3000 4000] [--out DIR]

Cuts one picture into tiles, and measures the mean step between neighbouring patches across tile borders over
the mean step elsewhere (1: no seam): each patch from the nearest tile, blended over an overlap, and aligned as well.
Artifacts of position and the context that a tile lacks both make seams; only the first can be cleaned. So it does the
same with a content-free picture, where every difference between tiles is artifact. A folder of photos becomes a
mosaic of six of them, whose borders are not tile borders. Also writes one sheet in colours, the same for all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from measuring import hardware, some_photos, table, write
from PIL import Image
from torch import Tensor

import denoising_vit as dv
from denoising_vit.backbones import Backbone
from denoising_vit.data.pictures import open_picture, reduced
from denoising_vit.denoiser.denoised_vit import DenoisedViT
from denoising_vit.extractors import Cleaners
from denoising_vit.maps import PCABasis
from denoising_vit.maps.sheet import Sheet
from denoising_vit.tiling.features import blend, layouts, seam_ratio
from denoising_vit.tiling.layout import TileOptions

#: Fractions of a mosaic's height and width that its photos take: uneven, since tile borders are evenly spaced.
_SHARES = (0.42, 0.58), (0.29, 0.36, 0.35)


def main(
    source: tyro.conf.Positional[Path | None] = None,
    /,
    size: tuple[int, int] = (3000, 4000),
    tile: int = 518,
    overlaps: tuple[int, ...] = (0, 126, 252),
    features: str = "raw,subtract,project,denoiser",
    backbone: str = "vit_small_patch14_dinov2.lvd142m",
    weights: str = "auto",
    out: Annotated[Path | None, tyro.conf.arg(help="folder for JSON, Markdown and the picture")] = None,
) -> None:
    """Measures seams in raw and clean features."""
    model = dv.load_backbone(backbone, weights=weights)
    names = features.split(",")
    pictures = {"picture": large(source, size), "no content": np.full((2 * tile, 2 * tile, 3), 128, np.uint8)}
    rows, drawn, found = [], {}, {"hardware": hardware(), "backbone": model.extra_repr(), "size": size, "tile": tile}
    for about, picture in pictures.items():
        for overlap in overlaps if about == "picture" else overlaps[:1]:
            for align in (False, True) if overlap else (False,):
                ratios, maps = measured(model, names, picture, TileOptions(tile, overlap, align))
                words = f"blended over {overlap} px" if overlap else "nearest tile"
                words += ", aligned" if align else ""
                found[f"{about}, {words}"] = ratios
                rows.append([about, words, *ratios.values()])
                print(rows[-1], flush=True)
                if about == "picture":
                    drawn[words] = maps
    markdown = table(["picture", "tiles", *names], rows)
    write(out, "tiles", found, markdown)
    if out is not None:
        draw(pictures["picture"], drawn, out / "tiles.png")


def large(source: Path | None, size: tuple[int, int]) -> np.ndarray:
    """A picture, or a mosaic of six photos of a folder, at a given size; scikit-image's retina if source is None."""
    if source is None:
        from skimage import data

        return enlarged(data.retina(), size)
    if source.is_file():
        picture = open_picture(source)
        return enlarged(np.asarray(picture[0 : picture.shape[0], 0 : picture.shape[1]]), size)
    chosen = some_photos(source, 6)
    photos = (chosen.read(index) for index in range(6))
    heights, widths = ([round(share * side) for share in shares] for shares, side in zip(_SHARES, size, strict=True))
    rows = [[enlarged(next(photos), (height, width)) for width in widths] for height in heights]
    return enlarged(np.concatenate([np.concatenate(row, axis=1) for row in rows]), size)


def enlarged(photo: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A photo resized, (H, W, 3)."""
    return np.asarray(Image.fromarray(photo).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def measured(
    model: Backbone, names: list[str], picture: np.ndarray, options: TileOptions
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Ratio of steps by name of the features, and the features; those that clean raw ones share its passes."""
    extractors = {name: Cleaners().extractor(name, model)[0] for name in names}

    def run(tile: Tensor) -> Tensor:
        raw = model(tile)
        each = [
            raw if one is model else one.clean(raw) if isinstance(one, DenoisedViT) else one(tile)
            for one in extractors.values()
        ]
        return torch.cat(each, dim=-1)[0]

    rows, columns = layouts(model, picture, options, None)
    with torch.inference_mode():
        found = blend(picture, rows, columns, model, run, align=options.align).chunk(len(names), dim=-1)
    maps = dict(zip(names, found, strict=True))
    return {name: round(seam_ratio(one, rows.seams, columns.seams), 3) for name, one in maps.items()}, maps


def draw(picture: np.ndarray, drawn: dict[str, dict[str, Any]], path: Path) -> None:
    """One row for each way to join tiles, one column for each kind of features."""
    basis = PCABasis.fit(*(one for maps in drawn.values() for one in maps.values()))
    names = next(iter(drawn.values())).keys()
    sheet = Sheet([picture.shape[1] / picture.shape[0]] * len(drawn), 1 + len(names))
    for row, (words, maps) in enumerate(drawn.items()):
        sheet.photo(row, reduced(picture, 1024), "picture")
        sheet.row_label(row, words.replace(",", " ").split()[-1 if "aligned" in words else 0])
        for column, name in enumerate(names, 1):
            sheet.picture(row, column, basis.colours(maps[name]), name)
    sheet.save(path)


if __name__ == "__main__":
    tyro.cli(main)
