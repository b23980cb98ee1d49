"""Rendering views: antialiased bicubic resampling of fractional boxes, from the original pixels, on any device.

Resampling is separable and linear, so a view is two matrix products. Boxes are not rounded to whole pixels, because on
a 500-pixel photo this would shift the patches of a small crop by up to an eighth of a patch.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.views.plan import ViewPlan


def to_image(photo: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32 in [0, 1]."""
    pixels = torch.from_numpy(np.array(photo, order="C")).to(device)  # a copy: arrays may be read-only or flipped
    return pixels.permute(2, 0, 1).float().div_(255).contiguous()  # (H, W, 3) -> (3, H, W)


def resized(images: Tensor, size: tuple[int, ...]) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] at another size (H, W): antialiased bicubic, overshoot clipped."""
    return F.interpolate(images, size, mode="bicubic", antialias=True).clamp_(0, 1)


def per_channel(values: tuple[float, ...], device: torch.device | str = "cpu") -> Tensor:
    """Per-channel values, such as a mean, as (3, 1, 1) for computing with images."""
    return torch.tensor(values, device=device)[:, None, None]


def resampling_matrix(start: float, stop: float, length: int, count: int) -> tuple[int, Tensor]:
    """Antialiased bicubic resampling of the span [start, stop) of ``length`` pixels to ``count`` pixels.

    Args:
        start: first edge of the span in pixels, possibly fractional.
        stop: last edge of the span.
        length: number of source pixels.
        count: number of result pixels.

    Returns:
        Index of the first source pixel used, and the weights (count, pixels used), float32; every row sums to one.
    """
    scale = (stop - start) / count
    widening = max(scale, 1.0)  # antialiasing: the kernel grows with the reduction
    centres = start + (np.arange(count) + 0.5) * scale
    first = max(math.floor(centres[0] - 2 * widening), 0)
    last = min(math.ceil(centres[-1] + 2 * widening), length)
    distance = np.abs(np.arange(first, last) + 0.5 - centres[:, None]) / widening
    weights = cubic_kernel(distance)
    return first, torch.from_numpy(weights / weights.sum(1, keepdims=True)).float()


class ViewRenderer:
    """Renderer of the views of one image (3, H, W) in [0, 1], on the image's device; normalised with mean and std."""

    def __init__(self, image: Tensor, plan: ViewPlan, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.plan = plan
        self.image = _squeezed(image, plan.size) if plan.released else _reduced(image, plan)
        self._mean, self._std = per_channel(mean, image.device), per_channel(std, image.device)

    def __call__(self, index: slice) -> Tensor:
        """Views ``index`` of the plan, normalised, (B, 3, H, W) float32."""
        boxes, flips = self.plan.boxes[index], self.plan.flips[index]
        if self.plan.released:
            rendered = torch.stack([self._cut(box, flip) for box, flip in zip(boxes, flips, strict=True)])
            return rendered.sub_(self._mean).div_(self._std)
        if self.image.device.type == "cpu":
            rendered = torch.stack([self._render(box, flip) for box, flip in zip(boxes, flips, strict=True)])
        else:
            half = torch.float16 if self.image.device.type == "cuda" else torch.float32
            rendered = render_boxes(self.image, boxes, flips, self.plan.size, half)
        # The cubic kernel overshoots at edges, but photos have no values outside [0, 1].
        return rendered.clamp_(0, 1).sub_(self._mean).div_(self._std)

    def _render(self, box: np.ndarray, flip: bool) -> Tensor:
        _, height, width = self.image.shape
        x0, y0, x1, y1 = box.tolist()
        top, rows = resampling_matrix(y0 * height, y1 * height, height, self.plan.size[0])
        left, columns = resampling_matrix(x0 * width, x1 * width, width, self.plan.size[1])
        if flip:
            columns = columns.flip(0)
        pixels = self.image[:, top : top + rows.shape[1], left : left + columns.shape[1]]
        return rows.to(pixels) @ (pixels @ columns.to(pixels).T)  # (H, y) (3, y, x) (x, W) -> (3, H, W)

    def _cut(self, box: np.ndarray, flip: bool) -> Tensor:
        """A box of whole pixels, cropped and upscaled, as in the released code; overshoot included."""
        height, width = self.plan.size
        left, top, right, bottom = np.round(box * (width, height, width, height)).astype(int).tolist()
        pixels = self.image[None, :, top:bottom, left:right]
        view = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0]
        return view.flip(2) if flip else view


def _squeezed(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a photo to a view bilinearly, in 8 bits, as the released code does before cropping."""
    pixels = image.mul(255).round().to("cpu", torch.uint8)
    return F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0].to(image) / 255


def _reduced(image: Tensor, plan: ViewPlan) -> Tensor:
    """Shrink a photo once if it has more pixels than the smallest crop needs."""
    sides = plan.boxes[:, 3] - plan.boxes[:, 1], plan.boxes[:, 2] - plan.boxes[:, 0]
    needed = [math.ceil(full / side.min()) for full, side in zip(plan.size, sides, strict=True)]
    target = tuple(min(have, need) for have, need in zip(image.shape[1:], needed, strict=True))
    return image if target == image.shape[1:] else resized(image[None], target)[0]


#: Number of views to render at once; each takes as much memory as the largest one.
_TOGETHER = 16

_CUBIC = -0.5  # the cubic kernel's parameter; Pillow and torch use this value for antialiased resampling

Distances = TypeVar("Distances", np.ndarray, Tensor)


def render_boxes(
    image: Tensor, boxes: np.ndarray, flips: np.ndarray, size: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """The boxes of an image, each rendered to the same size: (B, 3, H, W) float32, overshoot included.

    Args:
        image: (3, height, width) float in [0, 1].
        boxes: (B, 4), x0, y0, x1, y1 in [0, 1] of the image.
        flips: (B,), True if a view is mirrored.
        size: (H, W) of a view in pixels.
        dtype: precision of the products; float16 has errors of a few 1e-4, below the rounding of bfloat16 models.
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
        starts: (B,), first edges of the spans in pixels, possibly fractional.
        stops: (B,), last edges of the spans.
        length: number of source pixels.
        count: number of result pixels per span.
        mirrored: (B,), True if results are reversed.
        like: a tensor with the type and device of the results.

    Returns:
        Index of the first source pixel of each window, and weights (B, count, pixels of the largest window); rows sum
        to one.
    """
    scale = (stops - starts) / count
    widening = np.maximum(scale, 1.0)  # antialiasing: the kernel grows with the reduction
    centres = starts[:, None] + (np.arange(count) + 0.5) * scale[:, None]  # (B, count)
    first = np.maximum(np.floor(centres[:, 0] - 2 * widening), 0)
    last = np.minimum(np.ceil(centres[:, -1] + 2 * widening), length)
    wide = int((last - first).max())
    first = np.minimum(first, length - wide)  # all windows are as large as the largest, within the image
    centres = np.where(mirrored[:, None], centres[:, ::-1], centres) - first[:, None]
    # Relative to the window and divided by the kernel's width, positions are small enough for float32.
    grow = torch.from_numpy(widening.astype(np.float32)).to(like.device)[:, None, None]
    places = torch.from_numpy(centres.astype(np.float32)).to(like.device)[..., None]
    distance = (torch.arange(wide, device=like.device) + 0.5 - places).abs_().div_(grow)  # (B, count, wide)
    weights = cubic_kernel(distance)
    weights /= weights.sum(2, keepdim=True)
    return first.astype(int).tolist(), weights.to(like.dtype)
