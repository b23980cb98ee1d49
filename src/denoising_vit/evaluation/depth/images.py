"""A photo with its depth in metres, read from integer images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from denoising_vit.data.photos import MAX_PIXELS, use_image
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import JudgedImage

#: Pillow's modes of grayscale with more than 8 bits.
_DEEP = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})


@dataclass(frozen=True)
class DepthImage(JudgedImage):
    """A photo with its depth map.

    Attributes:
        depth: the file of the depth map, which has the photo's size.
        scale: units of its numbers in a metre; 1000 for millimetres.
        depth_digest: of its numbers.
        least: depth of its nearest pixel in metres.
        angle: degrees by which photo and depth are turned about the middle; what comes into view from outside is black,
            and has no depth.
    """

    depth: Path
    scale: float
    depth_digest: str
    least: float
    angle: float = 0.0

    @property
    def truth_digest(self) -> str:
        """Of the numbers and their scale."""
        return f"{self.depth_digest} {self.scale:g}"

    def rotated(self, angle: float) -> Self:
        """The same, turned by so many degrees."""
        return replace(self, angle=angle)

    def pixels(self) -> np.ndarray:
        """The photo, (H, W, 3) uint8.

        Raises:
            PhotoError: if it can no longer be read.
        """
        pixels = super().pixels()
        if not self.angle:
            return pixels
        return np.asarray(Image.fromarray(pixels).rotate(self.angle, Image.Resampling.BILINEAR))

    def metres(self) -> Tensor:
        """Depth (H, W) float32 in metres, 0 where it is not known.

        Raises:
            EvaluationError: if it can no longer be read.
        """
        metres = read_depth(self.depth).astype(np.float32) / self.scale
        if self.angle:
            metres = np.array(Image.fromarray(metres).rotate(self.angle, Image.Resampling.NEAREST))
        return torch.from_numpy(metres)


def read_depth(path: Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads a depth map as numbers (H, W) int32, 0 where depth is not known.

    Args:
        path: a grayscale image of 16 bits or more.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        EvaluationError: if the file is missing, damaged, too large, or has 8 bits or colours.
    """
    try:
        return use_image(path, lambda image: _numbers(image, path, max_pixels))
    except EvaluationError:
        raise
    except FileNotFoundError as error:
        raise EvaluationError(f"{path}: no such file, expected a depth map") from error
    except UnidentifiedImageError as error:
        raise EvaluationError(f"{path}: not an image file that can be read, expected depth as 16-bit PNG") from error
    except Exception as error:  # decoders meet damaged files with all kinds: OSError, SyntaxError, RuntimeError, ...
        raise EvaluationError(f"{path}: a damaged depth map ({error})") from error


def _numbers(image: Image.Image, path: Path, max_pixels: int) -> np.ndarray:
    """What an opened depth map holds; its header is checked first."""
    if image.width * image.height > max_pixels:
        raise EvaluationError(f"{path}: {image.width} x {image.height} pixels, more than the limit of {max_pixels:,}")
    if image.mode not in _DEEP:
        raise EvaluationError(f"{path}: {_shallow(image.mode)}")
    return np.asarray(image).astype(np.int32).clip(min=0)  # below 0 are marks of unknown depth


def _shallow(mode: str) -> str:
    if mode in ("L", "P", "1"):
        return (
            "expected depth in 16 bits, got 8 bits, too coarse for depth (it may be a picture of a depth map); give "
            "the original numbers as a 16-bit PNG"
        )
    return f"expected depth as one number a pixel in 16 bits, got an image of mode {mode}; give a 16-bit grayscale PNG"
