"""Rendering views: antialiased bicubic resampling of fractional boxes, from the original pixels, on any device.

Resampling is separable and linear, so a view is two matrix products. Boxes are not rounded to whole pixels: on a
500-pixel photo that would displace the patches of a small crop by up to an eighth of a patch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.views.batched_rendering import cubic_kernel, render_boxes
from denoising_vit.views.plan import ViewPlan


def to_image(photo: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32 in [0, 1]."""
    pixels = torch.from_numpy(np.array(photo, order="C")).to(device)  # a copy: arrays may be read-only or flipped
    return pixels.permute(2, 0, 1).float().div_(255).contiguous()  # (H, W, 3) -> (3, H, W)


def resampling_matrix(start: float, stop: float, length: int, count: int) -> tuple[int, Tensor]:
    """Antialiased bicubic resampling of the span [start, stop) of ``length`` pixels to ``count`` pixels.

    Args:
        start: first edge of the span in pixels, fractions allowed.
        stop: last edge of the span.
        length: pixels of the source.
        count: pixels of the result.

    Returns:
        The first source pixel used, and the weights (count, pixels used), float32; every row sums to one.
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
    """Renders the views of one image.

    Args:
        image: (3, H, W) float in [0, 1], on the device where views are wanted.
        plan: the views.
        mean: per-channel mean that the backbone expects to be subtracted.
        std: per-channel deviation that the backbone expects to be divided by.
    """

    def __init__(self, image: Tensor, plan: ViewPlan, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.plan = plan
        self.image = _squeezed(image, plan.size) if plan.released else _reduced(image, plan)
        self._mean = torch.tensor(mean, device=image.device)[:, None, None]
        self._std = torch.tensor(std, device=image.device)[:, None, None]

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
        # The cubic kernel overshoots at edges; no photo has values beyond [0, 1].
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
        """A box of whole pixels, cut out before it is enlarged, as the released code does; overshoot included."""
        height, width = self.plan.size
        left, top, right, bottom = np.round(box * (width, height, width, height)).astype(int).tolist()
        pixels = self.image[None, :, top:bottom, left:right]
        view = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0]
        return view.flip(2) if flip else view


def _squeezed(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A photo resized to a view bilinearly, in 8 bits, as the released code does before it crops."""
    pixels = image.mul(255).round().to("cpu", torch.uint8)
    return F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0].to(image) / 255


def _reduced(image: Tensor, plan: ViewPlan) -> Tensor:
    """Shrinks a photo that has more pixels than the smallest crop can show, once, instead of in every view."""
    sides = plan.boxes[:, 3] - plan.boxes[:, 1], plan.boxes[:, 2] - plan.boxes[:, 0]
    needed = [math.ceil(full / side.min()) for full, side in zip(plan.size, sides, strict=True)]
    target = [min(have, need) for have, need in zip(image.shape[1:], needed, strict=True)]
    if target == list(image.shape[1:]):
        return image
    return F.interpolate(image[None], target, mode="bicubic", antialias=True)[0].clamp_(0, 1)
