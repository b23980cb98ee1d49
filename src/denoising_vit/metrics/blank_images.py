"""Content-free images: clean features of them are the same everywhere, whatever the model, so the truth is known.

What features of such an image do change from place to place is artifact. That makes them a test that needs no label,
and training pairs whose targets hold no trace of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

#: Shares of single-coloured images among random ones, and of black, grey and white among these.
_UNIFORM, _GREY = 0.6, 0.25

#: Widest grain of noise in pixels: a patch shows many grains, so no patch differs from another but by chance.
_WIDEST_GRAIN = 4

#: Least and largest standard deviation of noise.
_CONTRAST = 0.01, 0.3


def uniform_images(colours: Tensor, size: tuple[int, int]) -> Tensor:
    """Images of one colour each, (B, 3, H, W) in [0, 1], from colours (B, 3) in [0, 1]."""
    return colours[:, :, None, None].expand(-1, -1, *size).clone()


def noise_image(
    size: tuple[int, int], colour: Tensor, contrast: float, grain: int, generator: torch.Generator
) -> Tensor:
    """Noise about a colour, (3, H, W) in [0, 1].

    Args:
        size: (H, W) in pixels.
        colour: (3,), in [0, 1].
        contrast: standard deviation of the noise, before values are limited to [0, 1].
        grain: side of a grain in pixels; wider ones are smooth.
        generator: source of the noise, on the CPU.
    """
    drawn = torch.randn(1, 3, *(-(-side // grain) + 1 for side in size), generator=generator)
    smooth = interpolate(drawn, scale_factor=grain, mode="bicubic") if grain > 1 else drawn
    noise = smooth[0, :, : size[0], : size[1]]
    return (colour[:, None, None] + contrast * noise / noise.std()).clamp(0, 1)


def random_blank_images(count: int, size: tuple[int, int], seed: int) -> Tensor:
    """Random uniform colours and fine noise, (B, 3, H, W) float32 in [0, 1], on the CPU; a seed gives the same ones."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(count):
        kind, grey, shade, power, grain = torch.rand(5, generator=generator).tolist()
        colour = torch.rand(3, generator=generator)
        if grey < _GREY:
            colour = torch.full((3,), round(2 * shade) / 2)  # black, mid-grey or white
        if kind < _UNIFORM:
            images.append(uniform_images(colour[None], size)[0])
            continue
        contrast = _CONTRAST[0] * (_CONTRAST[1] / _CONTRAST[0]) ** power
        images.append(noise_image(size, colour, contrast, 1 + int(grain * _WIDEST_GRAIN), generator))
    return torch.stack(images)


def variance_over_places(features: Tensor) -> float:
    """Mean over images and channels of the variance over places, of features (B, h, w, C)."""
    return float(features.double().flatten(1, 2).var(1, correction=0).mean())


def high_frequencies(features: Tensor) -> float:
    """The same of what a 3 x 3 mean does not explain: differences from patch to patch."""
    planes = features.double().permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
    smooth = torch.nn.functional.avg_pool2d(planes, 3, stride=1)
    return float((planes[..., 1:-1, 1:-1] - smooth).square().mean())
