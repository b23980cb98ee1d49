"""Stage 2 on pairs on the device: photos with fitted targets, and content-free images with known ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from scenes import normalised
from targets import Pairs
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.denoiser import Denoiser
from denoising_vit.metrics.blank_test import random_blank_images
from denoising_vit.training.blanks import clean_blanks
from denoising_vit.training.loop import denoising_loss, learning_rate

Size = tuple[int, int]


@dataclass(frozen=True)
class Training:
    """Training of the denoiser.

    Attributes:
        steps: number of optimizer steps.
        batch: pairs per step.
        blank: share of content-free images in a step.
        rate: peak learning rate.
        weight_decay: weight decay of AdamW.
        average: decay of the moving average of the weights, which is the result.
        subtract: targets without the calibrated artifact (G) if True.
        seed: seed for the weights and the order.
    """

    steps: int = 3000
    batch: int = 32
    blank: float = 0.2
    rate: float = 1e-3
    weight_decay: float = 1e-2
    average: float = 0.998
    subtract: bool = False
    seed: int = 0


@torch.no_grad()
def blank_features(backbone: Backbone, size: Size, count: int, seed: int, batch: int = 64) -> Tensor:
    """Raw features of random content-free images, (count, h, w, C) float16 on the device."""
    images = random_blank_images(count, size, seed).split(batch)
    return torch.cat([backbone(normalised(part.to(backbone.device), backbone)).half() for part in images])


def train(
    backbone: Backbone,
    pairs: Mapping[Size, Pairs],
    chosen: Mapping[Size, Tensor],
    blanks: Mapping[Size, Tensor],
    options: Training,
    watch: Callable[[int, float], None],
) -> Denoiser:
    """Trains a denoiser.

    Args:
        backbone: the backbone of these features.
        pairs: pairs by size.
        chosen: indices of the training pairs, by size.
        blanks: raw features of content-free images, by size.
        options: steps, batch and learning rate.
        watch: called with the step and the loss a few times during training.
    """
    device = backbone.device
    torch.manual_seed(options.seed)
    sizes: Sequence[Size] = list(pairs)
    denoiser = Denoiser(backbone.embed_dim, backbone.grid_size(*sizes[0])).to(device)
    order = torch.Generator().manual_seed(options.seed)
    shares = torch.tensor([float(len(chosen[size])) for size in sizes])
    known = round(options.blank * options.batch)

    def draw() -> tuple[Tensor, Tensor]:
        size = sizes[int(torch.multinomial(shares, 1, generator=order))]
        raw, target = batch_of(pairs[size], chosen[size], options.batch - known, options.subtract, order)
        if known:
            blank = some(blanks[size], known, order)
            raw, target = torch.cat([raw, blank]), torch.cat([target, clean_blanks(blank)])
        return raw, target

    return optimise(denoiser, draw, options, watch)


def optimise(
    denoiser: Denoiser,
    draw: Callable[[], tuple[Tensor, Tensor]],
    options: Training,
    watch: Callable[[int, float], None],
) -> Denoiser:
    """Trains a denoiser in place on the raw features and targets (B, h, w, C) that ``draw`` gives for each step.

    Returns the moving average of its weights.
    """
    average = copy.deepcopy(denoiser).eval().requires_grad_(False)
    adam = torch.optim.AdamW(denoiser.parameters(), lr=options.rate, weight_decay=options.weight_decay)
    for step in range(options.steps):
        for group in adam.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.rate, 1e-6, 0.1)
        raw, target = draw()
        with torch.autocast(raw.device.type, torch.bfloat16):
            clean = denoiser(raw)
        squared, cosine = denoising_loss(clean, target)
        loss = squared + 1 - cosine
        loss.backward()
        adam.step()
        adam.zero_grad()
        blend(average, denoiser, 1 - min(options.average, (1 + step) / (10 + step)))
        if step % max(options.steps // 5, 1) == 0:
            watch(step, loss.item())
    return average


def some(features: Tensor, count: int, order: torch.Generator) -> Tensor:
    """Random rows of the features (N, h, w, C), float32."""
    return features[torch.randint(len(features), (count,), generator=order).to(features.device)].float()


@torch.no_grad()
def blend(denoiser: Denoiser, other: Denoiser, share: float) -> None:
    """Moves the weights of a denoiser towards those of another one by the fraction ``share``."""
    for weights, others in zip(denoiser.parameters(), other.parameters(), strict=True):
        weights.lerp_(others, share)


def batch_of(pairs: Pairs, chosen: Tensor, count: int, subtract: bool, order: torch.Generator) -> tuple[Tensor, Tensor]:
    """Raw features and targets of some pairs, each mirrored or not, (count, h, w, C) float32."""
    device = pairs.raw.device
    index = chosen[torch.randint(len(chosen), (count,), generator=order).to(device)]
    mirror = (torch.rand(count, generator=order) < 0.5).to(device)[:, None, None, None]
    raw = torch.where(mirror, pairs.mirrored[index], pairs.raw[index]).float()
    target = pairs.target[index].float()
    if subtract:
        target = target + pairs.shift[pairs.plan[index]].float()
    return raw, torch.where(mirror, target.flip(2), target)


@torch.no_grad()
def apply(denoiser: Denoiser | None, raw: Tensor, batch: int = 64) -> Tensor:
    """Clean features (N, h, w, C) float16 of raw ones; the raw ones if there is no denoiser."""
    if denoiser is None:
        return raw
    with torch.autocast(raw.device.type, torch.bfloat16):
        parts = [denoiser(part.float()) for part in raw.split(batch)]
    return torch.cat([part.half() for part in parts])
