"""Backbones with planted, and so known, artifacts, and photos for them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import denoising_vit as dv
from denoising_vit.backbones import Backbone

PATCH, SIZE, CHANNELS = 8, 88, 24


class Local(nn.Module):
    """Clean features, which depend only on the pixels of the patch: (B, 3, H, W) -> (B, C, h, w)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        chance = torch.Generator().manual_seed(seed)
        self.mix = nn.Parameter(torch.randn(CHANNELS, 9, generator=chance), requires_grad=False)

    def forward(self, image: Tensor) -> Tensor:
        pooled = nn.functional.avg_pool2d(image, PATCH)
        contrast = nn.functional.avg_pool2d(image.square(), PATCH) - pooled.square()
        seen = torch.cat([pooled, contrast.clamp(min=0).sqrt(), pooled.roll(1, 1) * pooled], dim=1)  # (B, 9, h, w)
        return torch.einsum("kc,bchw->bkhw", self.mix, torch.tanh(seen))


class Planted(nn.Module):
    """Local features, a pattern that is the same for every image, and outlier tokens with a very large norm.

    Args:
        share: energy of the pattern relative to the local features' variance (about 60).
        outliers: share of the tokens that are made longer; the smallest change of the view changes the choice.
        longer: factor on their norm.
        blur: patches on a side over which features are averaged at the end.
    """

    def __init__(self, share: float = 0.0, outliers: float = 0.0, longer: float = 12.0, blur: int = 1) -> None:
        super().__init__()
        self.local, self.share, self.outliers, self.longer, self.blur = Local(), share, outliers, longer, blur

    def forward(self, image: Tensor) -> Tensor:
        features = self.local(image)
        h, w = features.shape[2:]
        if self.outliers:
            chaos = torch.frac(features[:, 0].abs() * 1e4)  # (B, h, w), evenly in [0, 1)
            features = torch.where((chaos < self.outliers)[:, None], features * self.longer, features)
        if self.share:
            features = features + pattern(h, w) * (self.share * 60.0) ** 0.5
        if self.blur > 1:
            edge = self.blur // 2
            padded = nn.functional.pad(features, (edge, edge, edge, edge), mode="replicate")
            features = nn.functional.avg_pool2d(padded, self.blur, 1)
        return features


def pattern(h: int, w: int) -> Tensor:
    """A ramp, a wave and a grid of noise with an energy of 1 per patch: (C, h, w)."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    chance = torch.Generator().manual_seed(7)
    waves = torch.stack([x, y, torch.cos(3 * x) * torch.sin(3 * y), torch.randn(h, w, generator=chance) * 0.5])
    directions = torch.randn(CHANNELS, 4, generator=chance)
    mixed = torch.einsum("ck,khw->chw", directions, waves)
    mixed = mixed - mixed.mean((1, 2), keepdim=True)
    return mixed / mixed.square().sum(0).mean().sqrt()


def backbone(**planted: float) -> Backbone:
    module = Planted(**planted)  # pyright: ignore[reportArgumentType]
    return dv.load_backbone(module, patch_size=PATCH, default_size=SIZE, device="cpu")


def photos(count: int, seed: int = 0) -> list[np.ndarray]:
    """Different photos of coloured patches with texture, 120 x 150 pixels."""
    chance = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        coarse = chance.uniform(0, 255, (6, 8, 3))
        large = np.kron(coarse, np.ones((20, 19, 1)))[:120, :150]
        fine = np.kron(chance.normal(0, 30, (40, 50, 3)), np.ones((3, 3, 1)))
        made.append((large + fine).clip(0, 255).astype(np.uint8))
    return made
