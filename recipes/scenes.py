"""Scenes (photos and crops of photos) and their views on the device."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.data import open_dataset
from denoising_vit.views.plan import areas_and_ratios
from denoising_vit.views.rendering import render_boxes

#: Grids (h, w) of patches and the share of scenes of each; the first is square.
SHAPES = (((37, 37), 0.56), ((26, 34), 0.12), ((34, 26), 0.08), ((24, 24), 0.12), ((34, 46), 0.12))


@dataclass(frozen=True)
class Scene:
    """A photo, or a part of one that is treated as a photo.

    Attributes:
        photo: index of the photo.
        box: left, top, right, bottom in pixels.
        flip: whether it is mirrored left to right.
    """

    photo: int
    box: tuple[int, int, int, int]
    flip: bool

    def cut(self, photos: Sequence[Tensor]) -> Tensor:
        """The pixels of the scene, (3, h, w) uint8."""
        x0, y0, x1, y1 = self.box
        image = photos[self.photo][:, y0:y1, x0:x1]
        return image.flip(-1) if self.flip else image


def read_photos(folder: Path, device: torch.device) -> list[Tensor]:
    """All photos of a folder, (3, H, W) uint8 each, on the device."""
    data = open_dataset(folder)
    with ThreadPoolExecutor(16) as pool:
        pixels = list(pool.map(data.read, range(len(data))))
    return [torch.from_numpy(np.array(photo)).to(device).permute(2, 0, 1).contiguous() for photo in pixels]


def draw_scenes(
    photos: Sequence[Tensor], count: int, seed: int, shapes: Sequence[tuple[tuple[int, int], float]]
) -> dict[tuple[int, int], list[Scene]]:
    """Scenes by input size (H, W): each photo as a whole, then crops of half of it or more.

    Args:
        photos: (3, H, W) each.
        count: scenes of each photo.
        seed: seed for the crops.
        shapes: sizes (H, W) in pixels and the share of scenes of each; whole photos have the first.
    """
    stream = np.random.RandomState(seed)
    sizes, shares = [size for size, _ in shapes], np.array([share for _, share in shapes])
    found: dict[tuple[int, int], list[Scene]] = {size: [] for size in sizes}
    for index, photo in enumerate(photos):
        height, width = photo.shape[1:]
        for number in range(count):
            size = sizes[0] if number == 0 else sizes[stream.choice(len(sizes), p=shares / shares.sum())]
            flip, draws = bool(stream.randint(2)), stream.random_sample(4)
            area, ratio = areas_and_ratios((0.5, 1.0), (3 / 4, 4 / 3), draws[:2])
            if number == 0:
                found[size].append(Scene(index, (0, 0, width, height), flip))
                continue
            # A crop of about the input's aspect ratio, to keep distortion small.
            frame = size[1] / size[0] * height / width
            wide = min(float(np.sqrt(area * ratio * frame)), 1.0)
            high = min(float(np.sqrt(area / ratio / frame)), 1.0)
            w, h = max(round(wide * width), 32), max(round(high * height), 32)
            x0, y0 = int(draws[2] * (width - w + 1)), int(draws[3] * (height - h + 1))
            found[size].append(Scene(index, (x0, y0, x0 + w, y0 + h), flip))
    return {size: scenes for size, scenes in found.items() if scenes}


def normalised(images: Tensor, backbone: Backbone) -> Tensor:
    """Images in [0, 1], overshoot included, (B, 3, H, W), as the backbone expects them."""
    mean, std = (torch.tensor(value, device=images.device)[:, None, None] for value in (backbone.mean, backbone.std))
    return images.clamp(0, 1).sub(mean).div(std)


def render(image: Tensor, boxes: np.ndarray, flips: np.ndarray, size: tuple[int, int], backbone: Backbone) -> Tensor:
    """Views of an image (3, h, w) uint8 on the device: (V, 3, H, W), normalised."""
    dtype = torch.float16 if image.device.type == "cuda" else torch.float32
    return normalised(render_boxes(image.float().div_(255), boxes, flips, size, dtype), backbone)
