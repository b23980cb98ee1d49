"""Draws the README's picture and the gallery: every free colour photograph included in scikit-image.

    python examples/gallery.py docs

Needs the extra `offline` and scikit-image, and takes a few minutes on two cores. The photographs are in the public
domain, CC0, or without known copyright restrictions, according to scikit-image's documentation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

import denoising_vit as dv
from denoising_vit.cli.app import run
from denoising_vit.extractors import Cleaners
from denoising_vit.maps.kinds import MAP_KINDS
from denoising_vit.show.options import ShowOptions
from denoising_vit.show.sheets import PhotoExtractor, ShownPhoto, draw_sheet, palette_of

#: All colour photographs that are included in scikit-image and free to show.
PHOTOS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")

FEATURES = "raw,subtract,project,denoiser,distilled,average,exact"
KINDS = {
    "pca": "The three strongest directions of the features as red, green and blue, in one basis for each row.",
    "norm": "The length of each feature vector, on one scale for each row.",
    "kmeans": "Six clusters, shared by all features of a row.",
    "similarity": "Cosine of each patch to the patch in the middle: red is similar, blue is opposite.",
}

_TEXT = """# Gallery

Features of every colour photograph that comes with scikit-image and is free to show, raw and clean: {names}. None was
excluded for its appearance. The stereo pair `motorcycle` is left out because its terms are not stated. Drawings
(`logo`, `colorwheel`) are left out too. The gallery is drawn by `python examples/gallery.py docs` with
{backbone} ({weights}), the denoiser and the distilled ViT in the package, and stage 1 on {views} wide
views with the G in the package and a constant for each view (`--offsets`).

In each row, all features share one set of colours, fitted to all of them together: different colours mean different
features. Patches are drawn as they are, without smoothing.

**What to look at.** In uniform areas (retina, sky behind the rocket, dark sky between galaxies), the features of the
denoiser and of the distilled ViT differ less from patch to patch than raw features, and edges of objects remain. The
distilled ViT separates the helmet from the suit (astronaut), like stage 1. The mean of shifted passes is the smoothest.
Subtracting G or projecting its directions out makes little visible difference.

**What to be careful about.** The colours of the denoiser are paler, because its feature vectors are shorter. Projecting
changes all colours of the deep field, where the photo shows little. Stage 1 is smoother than its patch size suggests,
because its views overlap. Without offsets, it shows straight lines where views end (cat, retina).
"""


def main() -> None:
    """Draw everything into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for cat.png, gallery.md and gallery/")
    parser.add_argument("--views", type=int, default=16, help="wide views of stage 1")
    arguments = parser.parse_args()
    folder = arguments.out / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    _draw_cat(arguments.out, folder)
    backbone = dv.load_backbone("vit_small_patch14_dinov2.lvd142m")
    options = ShowOptions(features=FEATURES, views=arguments.views, area=(0.4, 1.0), offsets=True)
    extractor = PhotoExtractor(backbone, FEATURES.split(","), Cleaners(artifact="shipped"), options.denoising())
    photos = [_extracted(extractor, name) for name in PHOTOS]
    for kind in KINDS:
        options = ShowOptions(features=FEATURES, maps=kind)
        palettes = [palette_of([photo], options) for photo in photos]
        sheet = folder / f"{kind}.png"
        draw_sheet(photos, palettes, sheet, options)
        with Image.open(sheet) as image:
            image.convert("RGB").save(sheet.with_suffix(".webp"), quality=90, method=6)  # a quarter of the bytes
        sheet.unlink()
    text = _TEXT.format(
        names=", ".join(f"`{name}`" for name in PHOTOS),
        backbone=backbone.name,
        weights=backbone.weights,
        views=arguments.views,
    )
    sections = [
        f"## {title}\n\n{says}\n\n![{title} of raw and clean features](gallery/{kind}.webp)"
        for kind, says in KINDS.items()
        for title in [MAP_KINDS[kind].title]
    ]
    (arguments.out / "gallery.md").write_text("\n\n".join([text.strip(), *sections]) + "\n")


def _draw_cat(out: Path, scratch: Path) -> None:
    """Draw the README's picture with the README's first command."""
    photo = Path(__file__).parent / "cat.jpg"
    if run(["denoise", str(photo), "-o", str(scratch), "--overwrite"]) != 0:
        raise SystemExit("the README's picture could not be drawn")
    (scratch / "cat.png").replace(out / "cat.png")
    (scratch / "cat.safetensors").unlink()


def _extracted(extractor: PhotoExtractor, name: str) -> ShownPhoto:
    pixels = np.ascontiguousarray(getattr(data, name)()[..., :3])
    return extractor(pixels, name=name.replace("_", " "))


if __name__ == "__main__":
    main()
