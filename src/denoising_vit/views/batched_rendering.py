"""Rendering many views of one image at once, for devices that would have to wait for matrices made by a processor.

The same resampling as one view at a time (`rendering`, which is the readable reference), as batched
products: each view brings a window of pixels, as large as the largest of its batch, and two matrices that are computed
on the device.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

#: Views that are rendered at once; all take as much memory as the one that shows most.
_TOGETHER = 16

_CUBIC = -0.5  # the cubic kernel's parameter; Pillow and torch use this value for antialiased resampling

Distances = TypeVar("Distances", np.ndarray, Tensor)


def render_boxes(
    image: Tensor, boxes: np.ndarray, flips: np.ndarray, size: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """The boxes of an image, each rendered to one size: (B, 3, H, W) float32, overshoot included.

    Args:
        image: (3, height, width) float in [0, 1].
        boxes: (B, 4), x0, y0, x1, y1 in [0, 1] of the image.
        flips: (B,), whether a view is mirrored.
        size: (H, W) of a view in pixels.
        dtype: of the products; float16 errs by a few ten-thousandths, which bfloat16 models do not see.
    """
    parts = [slice(start, start + _TOGETHER) for start in range(0, len(boxes), _TOGETHER)]
    return torch.cat([_render(image.to(dtype), boxes[part], flips[part], size) for part in parts])


def _render(image: Tensor, boxes: np.ndarray, flips: np.ndarray, size: tuple[int, int]) -> Tensor:
    _, height, width = image.shape
    x0, y0, x1, y1 = boxes.T
    tops, down = resampling_matrices(y0 * height, y1 * height, height, size[0], np.zeros_like(flips), image)
    lefts, across = resampling_matrices(x0 * width, x1 * width, width, size[1], flips, image)
    # Channels between rows and columns, so that both products are plain batched ones: (3, y, x) -> (y, 3, x).
    windows = [
        image[:, top : top + down.shape[2], left : left + across.shape[2]].transpose(0, 1)
        for top, left in zip(tops, lefts, strict=True)
    ]
    pixels = torch.stack(windows).flatten(1, 2)  # (B, y, 3, x) -> (B, y 3, x)
    wide = (pixels @ across.mT).unflatten(1, (-1, 3)).flatten(2)  # (B, y 3, W) -> (B, y, 3 W)
    rendered = (down @ wide).unflatten(2, (3, -1))  # (B, H, 3 W) -> (B, H, 3, W)
    return rendered.permute(0, 2, 1, 3).float()  # -> (B, 3, H, W)


def cubic_kernel(distance: Distances) -> Distances:
    """The cubic kernel at distances of at least 0, in widths of the kernel; 0 from 2 on."""
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * _CUBIC - 4 * _CUBIC
    return near * (distance < 1) + far * ((distance >= 1) & (distance < 2))


def resampling_matrices(
    starts: np.ndarray, stops: np.ndarray, length: int, count: int, mirrored: np.ndarray, like: Tensor
) -> tuple[list[int], Tensor]:
    """Antialiased bicubic resampling of spans of ``length`` pixels to ``count`` pixels each.

    Args:
        starts: (B,), first edges of the spans in pixels, fractions allowed.
        stops: (B,), last edges.
        length: pixels of the source.
        count: pixels of a result.
        mirrored: (B,), whether results run backwards.
        like: a tensor of the type and on the device that are wanted.

    Returns:
        The first source pixel of each window, and weights (B, count, pixels of the largest window); rows sum to one.
    """
    scale = (stops - starts) / count
    widening = np.maximum(scale, 1.0)  # antialiasing: the kernel grows with the reduction
    centres = starts[:, None] + (np.arange(count) + 0.5) * scale[:, None]  # (B, count)
    first = np.maximum(np.floor(centres[:, 0] - 2 * widening), 0)
    last = np.minimum(np.ceil(centres[:, -1] + 2 * widening), length)
    wide = int((last - first).max())
    first = np.minimum(first, length - wide)  # all windows are as large as the largest, within the image
    centres = np.where(mirrored[:, None], centres[:, ::-1], centres) - first[:, None]
    # Relative to the window and divided by the kernel's width, places are small enough for float32.
    grow = torch.from_numpy(widening.astype(np.float32)).to(like.device)[:, None, None]
    places = torch.from_numpy(centres.astype(np.float32)).to(like.device)[..., None]
    distance = (torch.arange(wide, device=like.device) + 0.5 - places).abs_().div_(grow)  # (B, count, wide)
    weights = cubic_kernel(distance)
    weights /= weights.sum(2, keepdim=True)
    return first.astype(int).tolist(), weights.to(like.dtype)
