"""Shared by the tests of calibrated artifacts: a backbone with a known artifact, and cheap photos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import denoising_vit as dv
from denoising_vit import Artifact, Backbone
from denoising_vit.backbones.recorded import describe

PATCH, SIDE, CHANNELS = 8, 56, 6  # a grid of 7 x 7
GRID = (7, 7)


def pattern(h: int, w: int, channels: int = CHANNELS) -> Tensor:
    """The planted artifact (h, w, C), mean zero: smooth, and at relative places, so that all grids have the same."""
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h * 2 - 1, (torch.arange(w) + 0.5) / w * 2 - 1, indexing="ij")
    maps = [torch.sin((c + 2) / 2 * x + c) + torch.cos((c + 1) / 2 * y) + 0.3 * x * y for c in range(channels)]
    planted = torch.stack(maps, dim=-1)
    return planted - planted.mean((0, 1))


class Planted(nn.Module):
    """A fixed random projection of each patch's pixels, plus the pattern times ``strength``."""

    def __init__(self, strength: float = 1.0, *, stride: int = PATCH, channels: int = CHANNELS, seed: int = 0) -> None:
        super().__init__()
        chance = torch.Generator().manual_seed(seed)
        self.project = nn.Conv2d(3, channels, PATCH, stride, bias=False)
        own = torch.randn(channels, 3, PATCH, PATCH, generator=chance) * 0.05
        colour = torch.randn(channels, 3, 1, 1, generator=chance) / PATCH**2
        self.project.weight.data = own + colour
        self.strength = strength
        self.passes = 0

    def forward(self, image: Tensor) -> Tensor:
        self.passes += 1
        local = self.project(image).permute(0, 2, 3, 1)  # (B, C, h, w) -> (B, h, w, C)
        return local + self.strength * pattern(*local.shape[1:]).to(local.device)


def backbone(strength: float = 1.0, *, stride: int = PATCH, **more: Any) -> Backbone:
    return plain(Planted(strength, stride=stride, **more), stride=stride)


def plain(extractor: Callable[[Tensor], Any], **more: Any) -> Backbone:
    return dv.load_backbone(extractor, patch_size=PATCH, default_size=SIDE, **more)


def artifact_of(extractor: Backbone, values: Tensor | None = None) -> Artifact:
    """The planted pattern as an artifact of a backbone, without calibrating."""
    values = pattern(*GRID, extractor.embed_dim) if values is None else values
    h, w = values.shape[:2]
    about = describe(extractor) | {"stride": extractor.stride, "patch_size": extractor.patch_size}
    return Artifact(values, (h * PATCH, w * PATCH), about, {"views": 16, "photos": ["a.jpg", "b.jpg"]})


def photos(count: int, seed: int = 0) -> list[np.ndarray]:
    """Different photos of coloured patches under fine texture, (90, 120, 3) each."""
    chance = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        coarse = np.kron(chance.uniform(0, 255, (6, 8, 3)), np.ones((15, 15, 1)))
        fine = np.kron(chance.normal(0, 30, (30, 40, 3)), np.ones((3, 3, 1)))
        made.append((coarse + fine).clip(0, 255).astype(np.uint8))
    return made


def flat(value: int = 0) -> np.ndarray:
    """A photo of a single grey value."""
    return np.full((90, 120, 3), value, np.uint8)


def write_photos(folder: Path, count: int, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(photos(count, seed)):
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


def correlation(found: Tensor, truth: Tensor) -> float:
    return float((found * truth).sum() / (found.norm() * truth.norm()))
