"""Tiny labelled folders, so that a comparison is fast, and sources of features for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import denoising_vit as dv
from denoising_vit.backbones import Backbone
from denoising_vit.evaluation.labelled import LabelledData, open_labelled
from denoising_vit.evaluation.sources import ExtractorSource

PATCH, SIZE = 8, 48

#: Colours of the classes.
PALETTE = np.array([[210, 60, 60], [60, 210, 60], [60, 60, 210]])

#: A photo (H, W, 3) uint8 and its mask (H, W) uint8.
Picture = tuple[np.ndarray, np.ndarray]


def write_labelled(root: Path, train: Sequence[Picture], val: Sequence[Picture], classes: int = 3) -> LabelledData:
    for split, pictures in (("train", train), ("val", val)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for number, (pixels, mask) in enumerate(pictures):
            Image.fromarray(pixels).save(root / split / "images" / f"{number:02}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{number:02}.png")
    (root / "classes.txt").write_text("".join(f"class {number}\n" for number in range(classes)))
    return open_labelled(root)


def coloured(count: int, seed: int, size: tuple[int, int] = (SIZE, SIZE), noise: float = 25.0) -> list[Picture]:
    """Blocks of a patch's size, each of a random class encoded by its colour; 255 is no label."""
    chance = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        blocks = chance.integers(0, 3, (-(-size[0] // PATCH), -(-size[1] // PATCH)))
        mask = np.kron(blocks, np.ones((PATCH, PATCH), int))[: size[0], : size[1]]
        pixels = PALETTE[mask] + chance.normal(0, noise, (*size, 3))
        pictures.append((pixels.clip(0, 255).astype(np.uint8), mask.astype(np.uint8)))
    return pictures


def colours(image: Tensor) -> Tensor:
    """Mean colour of each patch around grey: (B, 3, H, W) -> (B, h, w, 3)."""
    return torch.nn.functional.avg_pool2d(image, PATCH).permute(0, 2, 3, 1) - 0.4


def speckled(image: Tensor) -> Tensor:
    """The same under strong noise, different in each patch."""
    clean = colours(image)
    return clean + 2 * (torch.frac(clean.abs() * 9973) - 0.5)


def tiny_backbone(model: Callable[[Tensor], Tensor] = colours, patch_size: int = PATCH, size: int = SIZE) -> Backbone:
    return dv.load_backbone(model, patch_size=patch_size, default_size=size, mean=(0, 0, 0), std=(1, 1, 1))


def source_of(model: Callable[[Tensor], Tensor] = colours, name: str = "raw") -> ExtractorSource:
    return ExtractorSource(name, tiny_backbone(), model)
