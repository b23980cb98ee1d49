"""Crops of an image for a backbone, and the matching crops of semantic fields and masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.views.patch_grid import patch_centres
from denoising_vit.views.plan import ViewPlan, random_stream
from denoising_vit.views.rendering import ViewRenderer, per_channel
from denoising_vit.views.sampling import sample_field

#: Minimum and maximum side of a neutral crop, relative to the photo's.
_NEUTRAL_SIDES = 0.4, 0.8


@dataclass(frozen=True)
class Crop:
    """One crop of one image.

    Attributes:
        box: x0, y0, x1, y1 in [0, 1] of the image.
        size: (H, W) in pixels that the box is rendered to.
        pads: empty pixels to the left, top, right and bottom.
        flip: True if mirrored left to right.
        inverted: True if rotated by 180 degrees.
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    flip: bool = False
    inverted: bool = False

    @classmethod
    def whole(cls, size: tuple[int, int]) -> Crop:
        """The whole image."""
        return cls((0.0, 0.0, 1.0, 1.0), size)

    @classmethod
    def neutral(cls, number: int, size: tuple[int, int], seed: int) -> Crop:
        """A random square, upside down for half of the images, so that positions in views reveal little about content.

        In whole photos, the sky is at the top and the road at the bottom, so even clean features reveal the position.

        Args:
            number: number of the image; the same number gives the same crop.
            size: (H, W) of a view.
            seed: seed for all crops.
        """
        side, left, top = random_stream([seed, number]).random_sample(3).tolist()
        side = _NEUTRAL_SIDES[0] + side * (_NEUTRAL_SIDES[1] - _NEUTRAL_SIDES[0])
        left, top = left * (1 - side), top * (1 - side)
        # Not every other crop, so that an alternating split of photos puts both kinds into both halves.
        return cls((left, top, left + side, top + side), size, inverted=number % 4 >= 2)

    def snapped(self, height: int, width: int) -> Crop:
        """The same crop with a box of at least one whole pixel in an image of H x W pixels."""
        x0, y0, x1, y1 = self.box
        (left, right), (top, bottom) = _whole_pixels(x0, x1, width), _whole_pixels(y0, y1, height)
        return replace(self, box=(left / width, top / height, right / width, bottom / height))

    def cut(self, pixels: np.ndarray) -> np.ndarray:
        """The pixels of an image (H, W, 3) in the box, mirrored and rotated like the crop: (h, w, 3)."""
        height, width = pixels.shape[:2]
        x0, y0, x1, y1 = self.box
        (left, right), (top, bottom) = _whole_pixels(x0, x1, width), _whole_pixels(y0, y1, height)
        part = pixels[top:bottom, left:right]
        part = part[:, ::-1] if self.flip else part
        return part[::-1, ::-1] if self.inverted else part

    @property
    def padded(self) -> tuple[int, int]:
        """(H, W) in pixels of the backbone's input, pads included."""
        left, top, right, bottom = self.pads
        return self.size[0] + top + bottom, self.size[1] + left + right

    def places_shown(self, stretched: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Centres of the crop's own pixels in the rendered input, rows (H,) and columns (W,) in its pixels.

        Args:
            stretched: (H, W) in pixels, from the crop's start, over which the patch grid including pads is assumed to
                lie, as in the released code; None for the true positions.
        """
        left, top, _, _ = self.pads
        own = [np.arange(side) + 0.5 for side in self.size]
        if stretched is None:
            return own[0] + top, own[1] + left
        rows, columns = (at * shown / side for at, shown, side in zip(own, self.padded, stretched, strict=True))
        return rows, columns

    def render(
        self,
        image: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        colour: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The crop of an image (3, H, W) in [0, 1], normalised, (3, H, W) of :attr:`padded`; pads are 0.

        Args:
            image: image on any device.
            mean: per-channel mean to subtract.
            std: per-channel standard deviation to divide by.
            colour: augmentation of the colours (3, H, W) in [0, 1], applied before normalisation.
        """
        view = ViewPlan(np.array([self.box]), np.array([self.flip]), self.size, 1, 1, (2, 2))
        shown = ViewRenderer(image, view, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))(slice(1))[0]
        if colour is not None:
            shown = colour(shown)
        shift, scale = (per_channel(values, image.device) for values in (mean, std))
        shown = (shown - shift) / scale
        if self.inverted:
            shown = shown.flip((1, 2))
        left, top, right, bottom = self.pads
        return F.pad(shown, (left, right, top, bottom))

    def sample(self, nodes: Tensor, patch_size: int, stride: int) -> Tensor:
        """Sample a field of the image (Ry, Rx, C), on nodes at cell centres, at the crop's patches: (h, w, C)."""
        x0, y0, x1, y1 = self.box
        # In pixels of the rendered input.
        rows, columns = (patch_centres(side, patch_size, stride) * side for side in self.padded)
        return sample_field(nodes, y0 + self._rows(rows) * (y1 - y0), x0 + self._columns(columns) * (x1 - x0))

    def pixels(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of an image of H x W pixels for each row and column of the rendered input; -1 for none.

        Returns:
            (H,) and (W,) int64, by nearest neighbour.
        """
        x0, y0, x1, y1 = self.box
        rows, columns = self._rows(np.arange(self.padded[0]) + 0.5), self._columns(np.arange(self.padded[1]) + 0.5)
        return _pixel(rows, y0, y1, height), _pixel(columns, x0, x1, width)

    def places(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Rendered position of the rows and columns of an image of H x W pixels, in pixels; NaN if not shown.

        Returns:
            (H,) and (W,) float64, of pixel centres.
        """
        x0, y0, x1, y1 = self.box
        left, top, _, _ = self.pads
        rows, columns = ((np.arange(count) + 0.5) / count for count in (height, width))
        return (
            _place((rows - y0) / (y1 - y0), self.inverted, self.size[0]) + top,
            _place((columns - x0) / (x1 - x0), self.flip != self.inverted, self.size[1]) + left,
        )

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        """From rows of the rendered input, in pixels, to the box: in [0, 1], outside this range on the pads."""
        place = (rows - self.pads[1]) / self.size[0]
        return 1 - place if self.inverted else place

    def _columns(self, columns: np.ndarray) -> np.ndarray:
        place = (columns - self.pads[0]) / self.size[1]
        return 1 - place if self.flip != self.inverted else place


def _whole_pixels(start: float, stop: float, count: int) -> tuple[int, int]:
    first = min(round(start * count), count - 1)
    return first, max(round(stop * count), first + 1)


def _pixel(place: np.ndarray, start: float, stop: float, count: int) -> np.ndarray:
    pixel = np.clip(np.floor((start + place * (stop - start)) * count), 0, count - 1).astype(np.int64)
    return np.where((place > 0) & (place < 1), pixel, -1)


def _place(place: np.ndarray, mirrored: bool, side: int) -> np.ndarray:
    place = np.where((place > 0) & (place < 1), place, np.nan)
    return (1 - place if mirrored else place) * side
