"""Dry runs: every step of a row on synthetic data, with two random blocks and two training steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.timm_vit import TimmBackbone, build_timm_model
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.evaluation import depth
from denoising_vit.evaluation.depth.data import NYU_SIZE
from denoising_vit.evaluation.segmentation import RELEASED
from denoising_vit.reproduction.rows import ADE, IMAGENET_PHOTOS, NYU, VOC, VOC_PHOTOS
from denoising_vit.reproduction.running import DenoiserRecipe, DistilledRecipe, Protocols
from denoising_vit.training.options import ViewOptions

#: Sizes of the two images of each split: one is padded, the other divided into windows.
_SIZES = ((48, 64), (60, 40))


def dry_backbone(model: str) -> Backbone:
    """The model with two blocks and random weights; BackboneError if timm has no such model."""
    built = build_timm_model(model, pretrained=False, depth=2)
    return TimmBackbone(built, name=model, stride=None, layer=-1, norm=True, weights="random, two blocks")


def dry_protocols(backbone: Backbone) -> Protocols:
    """The released protocols with two steps of one crop, or of two pairs, on 8 x 8 patches."""
    denoised, distilled = DenoiserRecipe(), DistilledRecipe()
    return Protocols(
        segmentation=replace(RELEASED, steps=2, warmup=1, batch=1),
        depth=replace(depth.RELEASED, steps=2, warmup=1, batch=1),
        recipe=DenoiserRecipe(
            denoising=DenoiseOptions(views=8, held_out=0, size=8 * backbone.patch_size),
            training=replace(denoised.training, steps=2, batch_size=1, accumulate=2),
        ),
        distilling=DistilledRecipe(
            training=replace(distilled.training, steps=2, batch_size=1, accumulate=2, held_out=1),
            views=ViewOptions(sizes=str(8 * backbone.patch_size)),
        ),
    )


def dry_data(folder: Path) -> Path:
    """Write images in the layouts of VOC, ADE20K, NYUv2 (full size) and ImageNet, and return the folder."""
    chance = np.random.default_rng(0)
    _write_voc(folder / VOC.place, chance)
    _write_ade(folder / ADE.place, chance)
    _write_nyu(folder / NYU.place, chance)
    for number, size in enumerate(_SIZES):
        _write(folder / VOC_PHOTOS.places[1] / f"{number:06}.jpg", _noise(size, chance))
        for name in ("n01440764", "n01443537"):
            _write(folder / IMAGENET_PHOTOS.places[0] / name / f"{name}_{number}.JPEG", _noise(size, chance))
    names = [f"VOC2012/JPEGImages/train_{number}.jpg" for number in range(len(_SIZES))]
    names += [f"VOC2007/JPEGImages/{number:06}.jpg" for number in range(len(_SIZES))]
    assert VOC_PHOTOS.listed is not None
    (folder / VOC_PHOTOS.listed).write_text("".join(f"data/VOCdevkit/{name}\n" for name in names))
    return folder


def _write_voc(root: Path, chance: np.random.Generator) -> None:
    for split in ("train", "val"):
        names = [f"{split}_{number}" for number in range(len(_SIZES))]
        listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("\n".join(names) + "\n")
        for name, size in zip(names, _SIZES, strict=True):
            labels = _blocks(size, 21, chance)
            labels[0] = 255
            mask = Image.fromarray(labels)
            mask.putpalette(chance.integers(256, size=768, dtype=np.uint8).tobytes())
            _write(root / "JPEGImages" / f"{name}.jpg", _noise(size, chance))
            _write(root / "SegmentationClass" / f"{name}.png", mask)


def _write_ade(root: Path, chance: np.random.Generator) -> None:
    for split in ("training", "validation"):
        for number, size in enumerate(_SIZES):
            _write(root / "images" / split / f"ADE_{split}_{number}.jpg", _noise(size, chance))
            mask = Image.fromarray(_blocks(size, 151, chance))
            _write(root / "annotations" / split / f"ADE_{split}_{number}.png", mask)


def _write_nyu(root: Path, chance: np.random.Generator) -> None:
    for split in ("train", "test"):
        photo, depths = f"scene/rgb_{split}.jpg", f"scene/depth_{split}.png"
        _write(root / photo, _noise(NYU_SIZE, chance))
        millimetres = 1000 + 20 * _blocks(NYU_SIZE, 200, chance).astype(np.uint16)
        _write(root / depths, Image.fromarray(millimetres))
        (root / f"nyu_{split}.txt").write_text(f"/{photo} /{depths} 518.8579\n")


def _write(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _noise(size: tuple[int, int], chance: np.random.Generator) -> Image.Image:
    return Image.fromarray(chance.integers(256, size=(*size, 3), dtype=np.uint8))


def _blocks(size: tuple[int, int], classes: int, chance: np.random.Generator) -> np.ndarray:
    """Random labels in blocks of 4 x 4 pixels."""
    coarse = chance.integers(classes, size=(size[0] // 4, size[1] // 4), dtype=np.uint8)
    return coarse.repeat(4, 0).repeat(4, 1)
