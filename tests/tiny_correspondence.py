"""Tiny videos and pairs of photos, so that a comparison is fast; their colours show what corresponds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.environment import run_info
from denoising_vit.evaluation.data import EvaluationData
from denoising_vit.evaluation.results import Results
from denoising_vit.evaluation.workbench import Workbench
from denoising_vit.extractors import Extractor
from denoising_vit.progress import Progress, no_progress
from tiny_labelled import PATCH, colours, speckled, tiny_backbone

#: Size of a video's frames.
HEIGHT, WIDTH = 96, 128

#: Colours of the background and of the objects.
GROUND, OBJECTS = (60, 120, 170), ((210, 60, 60), (60, 210, 60))

#: A frame (H, W, 3) uint8 and its mask (H, W) uint8, or None.
Shot = tuple[np.ndarray, np.ndarray | None]


def frame(places: Sequence[tuple[int, int]], seed: int, side: int = 40, white: bool = False) -> Shot:
    """A square in each object's colour at its position (y, x), on a background of another colour, with noise."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    pixels = np.full((HEIGHT, WIDTH, 3), GROUND, dtype=float)
    for number, (y, x) in enumerate(places, start=1):
        mask[y : y + side, x : x + side] = 255 if white else number
        pixels[y : y + side, x : x + side] = OBJECTS[number - 1]
    pixels += np.random.default_rng(seed).normal(0, 20, pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8), mask


def moving(count: int = 6, seed: int = 0, step: int = PATCH) -> list[Shot]:
    """A square that moves to the right; black and white masks."""
    return [frame([(24, 8 + step * number)], 100 * seed + number, white=True) for number in range(count)]


def crossing(count: int = 6, seed: int = 0) -> list[Shot]:
    """Two squares that move; masks with their numbers."""
    return [frame([(0, PATCH * number), (56, 88 - PATCH * number)], 100 * seed + number) for number in range(count)]


def save_mask(path: Path, mask: np.ndarray) -> None:
    """Numbers as a palette image, as DAVIS 2017 has them; black and white as grayscale, as DAVIS 2016."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    if mask.max() < 255:
        image.putpalette(list(range(256)) * 3)
    image.save(path)


def write_davis(root: Path, clips: Mapping[str, Sequence[Shot]], resolution: str = "480p") -> Path:
    """Frames as PNG, which keeps colours, under the names of JPEG's numbering."""
    for sequence, shots in clips.items():
        photos, masks = (root / kind / resolution / sequence for kind in ("JPEGImages", "Annotations"))
        for folder in (photos, masks):
            folder.mkdir(parents=True)
        for number, (pixels, mask) in enumerate(shots):
            Image.fromarray(pixels).save(photos / f"{number:05}.png")
            if mask is not None:
                save_mask(masks / f"{number:05}.png", mask)
    return root


#: Colours of keypoints, far from each other and from the ground.
MARKS = ((230, 40, 40), (40, 230, 40), (40, 40, 230), (230, 230, 40))


def marked(seed: int, height: int = 64, width: int = 96) -> tuple[np.ndarray, list[list[float]]]:
    """A photo with a patch of each mark's colour at random places, and the marks' middles (x, y)."""
    chance = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    cells = chance.choice((height // PATCH) * (width // PATCH), len(MARKS), replace=False)
    points = []
    for cell, colour in zip(cells.tolist(), MARKS, strict=True):
        y, x = (PATCH * place for place in divmod(cell, width // PATCH))
        pixels[y : y + PATCH, x : x + PATCH] = colour
        points.append([x + PATCH / 2 - 0.5, y + PATCH / 2 - 0.5])
    pixels += chance.normal(0, 10, pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8), points


def pair_of(source: int, target: int, **changes: Any) -> dict[str, Any]:
    """Content of the file of a pair of marked photos; boxes are the whole photo."""
    return {
        "category": "mark",
        "src_imname": f"{source:02}.png",
        "trg_imname": f"{target:02}.png",
        "src_imsize": [96, 64, 3],
        "trg_imsize": [96, 64, 3],
        "src_kps": marked(source)[1],
        "trg_kps": marked(target)[1],
        "trg_bndbox": [0, 0, 96, 64],
    } | changes


def write_spair(root: Path, pairs: Sequence[tuple[int, int]], split: str = "test") -> Path:
    """Pairs of marked photos by their seeds."""
    photos = root / "JPEGImages" / "mark"
    photos.mkdir(parents=True, exist_ok=True)
    for seed in {seed for pair in pairs for seed in pair}:
        Image.fromarray(marked(seed)[0]).save(photos / f"{seed:02}.png")
    for number, (source, target) in enumerate(pairs):
        write_pair(root, f"{number:06}-{source:02}-{target:02}:mark", pair_of(source, target), split)
    return root


def write_pair(root: Path, name: str, content: Any, split: str = "test") -> None:
    folder = root / "PairAnnotation" / split
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))


def shuffled(image: Tensor) -> Tensor:
    """Patch colours permuted, differently in each image."""
    features = colours(image)
    b, h, w, c = features.shape
    found = []
    for one in features.reshape(b, h * w, c):
        generator = torch.Generator().manual_seed(int(one.abs().sum() * 1e4))
        found.append(one[torch.randperm(h * w, generator=generator)])
    return torch.stack(found).reshape(b, h, w, c)


def workbench(
    folder: Path,
    data: EvaluationData,
    extractors: Mapping[str, Extractor] | None = None,
    watch: Progress = no_progress,
    backbone: Backbone | None = None,
) -> Workbench:
    return Workbench(
        data=data,
        backbone=backbone or tiny_backbone(speckled),
        spec=BackboneSpec("tiny"),
        results=Results(folder / "results.jsonl"),
        folder=folder / "cache",
        run=run_info(["evaluate"]),
        extractors=extractors or {},
        progress=watch,
    )
