"""Tiny photos with depth, so that a comparison is fast; red encodes the depth, or nothing does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import denoising_vit as dv
from denoising_vit.backbones import Backbone
from denoising_vit.evaluation.data import EvaluationSet
from denoising_vit.evaluation.depth import DepthData, DepthImage, open_depth
from denoising_vit.evaluation.depth.probe import DepthProbe
from denoising_vit.evaluation.sources import ExtractorSource

PATCH, SIZE = 4, (32, 48)

#: Red value per metre of depth.
RED = 40

#: A photo (H, W, 3) uint8 and its depth (H, W) in metres.
Picture = tuple[np.ndarray, np.ndarray]


# --- Files


def write_depth(path: Path, metres: np.ndarray, scale: float = 1000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.round(metres * scale).astype(np.uint16)).save(path)


def write_photo(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_pairs(root: Path, pictures: Sequence[Picture], scale: float = 1000) -> Path:
    """rgb/ and depth/, without splits."""
    for number, (pixels, metres) in enumerate(pictures):
        write_photo(root / "rgb" / f"{number:02}.png", pixels)
        write_depth(root / "depth" / f"{number:02}.png", metres, scale)
    return root


def write_splits(root: Path, train: Sequence[Picture], val: Sequence[Picture], scale: float = 1000) -> Path:
    write_pairs(root / "train", train, scale)
    write_pairs(root / "val", val, scale)
    return root


def write_nyu(root: Path, train: Sequence[Picture], val: Sequence[Picture]) -> Path:
    """The published archive's layout: two lists, whose paths begin with a slash."""
    for name, pictures in (("train", train), ("test", val)):
        lines = []
        for number, (pixels, metres) in enumerate(pictures):
            photo, depth = f"/{name}_0001/rgb_{number:05}.png", f"/{name}_0001/sync_depth_{number:05}.png"
            write_photo(root / photo[1:], pixels)
            write_depth(root / depth[1:], metres)
            lines.append(f"{photo} {depth} 518.8579\n")
        (root / f"nyu_{name}.txt").write_text("".join(lines))
    return root


# --- Pictures


def red_of(metres: np.ndarray, chance: np.random.Generator | None = None) -> np.ndarray:
    """A photo whose red is the depth, and whose green and blue are only noise."""
    pixels = np.zeros((*metres.shape, 3))
    pixels[..., 0] = metres * RED
    if chance is not None:
        pixels[..., 1:] = chance.uniform(0, 255, (*metres.shape, 2))
    return pixels.round().clip(0, 255).astype(np.uint8)


def blocky(count: int, seed: int, size: tuple[int, int] = SIZE, side: int = 8) -> list[Picture]:
    """Blocks, each of a random depth from 1 to 5 m."""
    chance = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        coarse = chance.uniform(1, 5, (-(-size[0] // side), -(-size[1] // side)))
        metres = coarse.repeat(side, 0).repeat(side, 1)[: size[0], : size[1]]
        made.append((red_of(metres, chance), metres))
    return made


def ramp(size: tuple[int, int]) -> np.ndarray:
    """A photo whose red is the column and whose green is the row, exactly."""
    rows, columns = np.meshgrid(np.arange(size[0]), np.arange(size[1]), indexing="ij")
    return np.stack([columns, rows, np.zeros(size)], -1).astype(np.uint8)


def flat(metres: float, size: tuple[int, int] = SIZE) -> Picture:
    depth = np.full(size, metres)
    return red_of(depth), depth


# --- Features


def pooled(patch: int = PATCH, stride: int | None = None) -> Callable[[Tensor], Tensor]:
    """The mean colour of each patch: (B, 3, H, W) -> (B, h, w, 3)."""
    return lambda image: F.avg_pool2d(image, patch, stride or patch).permute(0, 2, 3, 1)


def telling(image: Tensor) -> Tensor:
    return pooled()(image)


def noisy(image: Tensor) -> Tensor:
    """The same under strong noise, different in each patch."""
    clean = telling(image)
    return clean + 2 * (torch.frac(clean.abs() * 9973) - 0.5)


def backbone(model: Callable[[Tensor], Any] = telling, patch: int = PATCH, stride: int | None = None) -> Backbone:
    more: dict[str, Any] = {"mean": (0, 0, 0), "std": (1, 1, 1), "layout": "channels_last"}
    return dv.load_backbone(model, patch_size=patch, stride=stride or patch, default_size=12 * patch, **more)


def source_of(model: Callable[[Tensor], Tensor] = telling, name: str = "raw") -> ExtractorSource:
    return ExtractorSource(name, backbone(), model)


def with_token(image: Tensor) -> Tensor:
    """Uninformative patch tokens, behind a class token that is the image's mean colour."""
    patches = F.avg_pool2d(image, PATCH).flatten(2).transpose(1, 2) * 0
    return torch.cat([image.mean((2, 3))[:, None], patches], 1)


def token_backbone(model: Callable[[Tensor], Tensor] = with_token) -> Backbone:
    more: dict[str, Any] = {"mean": (0, 0, 0), "std": (1, 1, 1), "layout": "tokens"}
    return dv.load_backbone(model, patch_size=PATCH, default_size=12 * PATCH, **more)


# --- Probes and data


def linear_probe(
    channel: int, scale: float, near: float, far: float, channels: int = 3, upsample: int = 4
) -> DepthProbe:
    """Of two bins, set by hand: depth is linear in a feature times scale, which is to lie between 0 and 1."""
    probe = DepthProbe(channels, 2, near, far, upsample, seed=0)
    with torch.no_grad():
        probe.weigh.weight.zero_()
        probe.weigh.weight[:, channel] = torch.tensor([-scale, scale])
        probe.weigh.bias.copy_(torch.tensor([1.0, 0.0]))
    return probe.eval()


def linear_depth(feature: np.ndarray, scale: float, near: float, far: float) -> np.ndarray:
    """Prediction of such a probe: weights are 1.1 - f and f + 0.1, which sum to 1.2."""
    share = feature * scale
    return (near * (1.1 - share) + far * (share + 0.1)) / 1.2


def data_of(root: Path, pictures: Sequence[Picture], blocks: int = 2) -> DepthData:
    """All pictures are used both for training and for evaluation, in blocks."""
    return open_depth(write_pairs(root, pictures), blocks=blocks)


def set_of(root: Path, pictures: Sequence[Picture], scale: float = 1000) -> EvaluationSet[DepthImage]:
    """One split with all the pictures."""
    found = open_depth(write_splits(root, pictures[:1], pictures, scale), scale=scale)
    return found.val
