"""Random crops and colours of the published protocol."""

from __future__ import annotations

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from denoising_vit.evaluation.masks import NO_LABEL
from denoising_vit.evaluation.patches import centre_pads
from denoising_vit.evaluation.segmentation.protocol import Protocol
from denoising_vit.views.crops import Crop

#: Crops to try before one is taken although a class fills it.
_TRIES = 10


def scaled_size(height: int, width: int, short_side: float, long_side: float) -> tuple[int, int]:
    """(H, W) of an image scaled to the largest size within both limits, with its aspect ratio kept."""
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def training_crop(labels: Tensor, protocol: Protocol, patch: tuple[int, int], chance: np.random.Generator) -> Crop:
    """Draw a crop of a randomly scaled image, padded to the right and below, and to whole patches."""
    scale = chance.uniform(*protocol.scale)
    limits = int(protocol.short_side * scale), int(protocol.long_side * scale)
    height, width = scaled_size(labels.shape[0], labels.shape[1], *limits)
    crop = _crop_at(height, width, protocol.crop, patch, chance)
    for _ in range(_TRIES):
        if _mixed(labels_of(crop, labels), protocol.most):
            break
        crop = _crop_at(height, width, protocol.crop, patch, chance)
    flip = bool(chance.random() < protocol.flip)
    return Crop(crop.box, crop.size, crop.pads, flip=flip)


def labels_of(crop: Crop, labels: Tensor) -> Tensor:
    """Labels (H, W) of a crop without pads, by nearest neighbour."""
    rows, columns = (torch.from_numpy(found[found >= 0]) for found in crop.pixels(*labels.shape))
    return labels[rows][:, columns]


def distort(image: Tensor, chance: np.random.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue of an image (3, H, W) in [0, 1], each with probability 1/2.

    Contrast comes before or after saturation and hue. Saturation blends with grey; the published code scales it in HSV.
    """
    brightness, contrast, saturation, hue, early = chance.random(5) < 0.5
    delta, factor = chance.uniform(-32, 32) / 255, chance.uniform(0.5, 1.5)
    richness, turn = chance.uniform(0.5, 1.5), chance.uniform(-18, 18) / 180
    if brightness:
        image = (image + delta).clamp(0, 1)
    if contrast and early:
        image = (image * factor).clamp(0, 1)
    if saturation:
        image = TF.adjust_saturation(image, richness)
    if hue:
        image = TF.adjust_hue(image, turn)
    if contrast and not early:
        image = (image * factor).clamp(0, 1)
    return image


def _crop_at(height: int, width: int, side: int, patch: tuple[int, int], chance: np.random.Generator) -> Crop:
    shown = min(side, height), min(side, width)
    top, left = (int(chance.integers(full - part + 1)) for full, part in zip((height, width), shown, strict=True))
    box = (left / width, top / height, (left + shown[1]) / width, (top + shown[0]) / height)
    before_x, before_y, after_x, after_y = centre_pads(side, side, *patch)
    return Crop(box, shown, (before_x, before_y, after_x + side - shown[1], after_y + side - shown[0]))


def _mixed(labels: Tensor, most: float) -> bool:
    """True if there are at least two classes, none with more than the share ``most`` of the labels."""
    counts = torch.bincount(labels[labels != NO_LABEL].flatten())
    return int((counts > 0).sum()) > 1 and float(counts.max()) < most * float(counts.sum())
