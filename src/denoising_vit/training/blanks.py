"""Content-free images as training pairs: their clean features are known, because they are the same everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.files import compact
from denoising_vit.metrics.blank_test import random_blank_images
from denoising_vit.training.samples import blank_numbers

#: Number of images per size, and images per forward pass.
BLANKS, _BATCH = 128, 4

#: Least variance over positions in :func:`blank_loss`, as a fraction of the features' mean square.
_LEAST = 1e-3


@dataclass(frozen=True, eq=False)
class Blanks:
    """Raw features of uniform and noisy images.

    Attributes:
        raw: features (N, h, w, C) of each size, on the CPU, in float16 unless values exceed its range.
        seed: seed of the run.
    """

    raw: tuple[Tensor, ...]
    seed: int

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        backbone: Backbone,
        sizes: Sequence[tuple[int, int]],
        seed: int,
        on_image: Callable[[], None] = lambda: None,
    ) -> Blanks:
        """Run the backbone on images of each size (H, W); ``on_image`` is called after each image."""
        raw = []
        for size in sizes:
            parts = []
            for start in range(0, BLANKS, _BATCH):
                images = blank_images(backbone, size, _BATCH, seed + start)
                parts.append(compact(backbone(images.to(backbone.device, backbone.dtype)).cpu()))
                for _ in images:
                    on_image()
            raw.append(torch.cat(parts))
        return cls(tuple(raw), seed)

    def draw(self, size: int, step: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Raw and clean features (count, h, w, C) float32 for a step; determined by the seed.

        Args:
            size: index of the size.
            step: number of the step.
            first: number of this step's images in earlier batches and processes.
            count: number of images.
        """
        raw = self.raw[size][blank_numbers(self.seed, step, first, count, BLANKS)].float()
        return raw, clean_blanks(raw)


def clean_blanks(raw: Tensor) -> Tensor:
    """Clean features (B, h, w, C) of content-free images: the same everywhere, the mean of their raw features."""
    return raw.mean((1, 2), keepdim=True).expand_as(raw)


def blank_loss(features: Tensor, raw: Tensor) -> Tensor:
    """Variance over positions on content-free images, relative to that of each image's raw features; averaged.

    The published loss hardly sees it: features of a ViT-S/14 (DINOv2) vary over positions of such images by 0.7 % of
    their mean square. It has no term for the mean, which differs between images and would make small steps noisy.

    Args:
        features: output of the trained model, (B, h, w, C).
        raw: features of the frozen backbone.
    """
    left, whole = ((one - one.mean((1, 2), keepdim=True)).square().mean((1, 2, 3)) for one in (features, raw))
    return (left / torch.maximum(whole, _LEAST * raw.square().mean((1, 2, 3)))).mean()


def blank_images(backbone: Backbone, size: tuple[int, int], count: int, seed: int) -> Tensor:
    """Random content-free images (count, 3, H, W), normalized, float32 on the CPU."""
    return backbone.normalise(random_blank_images(count, size, seed))
