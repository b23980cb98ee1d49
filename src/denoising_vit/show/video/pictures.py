"""One frame as it comes from a file: turned upright, over white, at any size, without a full-size copy in RGB."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from denoising_vit.data.photos import read_photo

#: From this height on, frames that do not tell their colour space are taken for BT.709, below for BT.601.
HIGH_DEFINITION = 720

#: Value of a frame's colour space that says nothing.
_UNSPECIFIED = 2


class Picture(Protocol):
    """A frame that is not in its final size yet."""

    def size(self) -> tuple[int, int]:
        """(H, W) as it is to be shown, upright and with square pixels.

        Raises:
            PhotoError: if it cannot be read.
        """
        ...

    def at(self, size: tuple[int, int]) -> np.ndarray:
        """The frame in (H, W) pixels: (H, W, 3) uint8.

        Raises:
            PhotoError: if it cannot be read.
        """
        ...


class PhotoPicture:
    """A frame in an image file; read once, at the first question, and kept for as long as this object is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pixels: np.ndarray | None = None

    def size(self) -> tuple[int, int]:
        """(H, W) of the photo."""
        height, width = self._read().shape[:2]
        return height, width

    def at(self, size: tuple[int, int]) -> np.ndarray:
        """The photo in (H, W) pixels."""
        image = Image.fromarray(self._read())
        return np.asarray(image.resize((size[1], size[0]), Image.Resampling.LANCZOS, reducing_gap=3.0))

    def _read(self) -> np.ndarray:
        if self._pixels is None:
            self._pixels = read_photo(self._path)
        return self._pixels


@dataclass(frozen=True, eq=False)
class FilmPicture:
    """A decoded frame of a video.

    Attributes:
        frame: of PyAV.
        aspect: width over height of a pixel.
        matrix: how frames of this video are turned and mirrored.
        scaler: of PyAV, shared by all frames, so that each size is prepared for once.
    """

    frame: Any
    aspect: float
    matrix: tuple[int, ...] | None
    scaler: Callable[[tuple[int, int]], Any]

    def size(self) -> tuple[int, int]:
        """(H, W) as players show it."""
        return shown_size((self.frame.height, self.frame.width), self.aspect, self.matrix)

    def at(self, size: tuple[int, int]) -> np.ndarray:
        """The frame in (H, W) pixels; shrunk in its own colour format, so that no large copy in RGB is ever made."""
        height, width = size[::-1] if _is_quarter(self.matrix) else size
        alpha = self.frame.format.name == "pal8" or any(part.is_alpha for part in self.frame.format.components)
        unknown = self.frame.colorspace == _UNSPECIFIED and self.frame.height >= HIGH_DEFINITION
        pixels = (
            self.scaler(size)
            .reformat(
                self.frame,
                width=width,
                height=height,
                format="rgba" if alpha else "rgb24",
                interpolation="AREA" if self.frame.height > height else "BICUBIC",
                src_colorspace="ITU709" if unknown else None,
                threads=1,
            )
            .to_ndarray()
        )
        return upright(over_white(pixels) if alpha else pixels, self.matrix)


def over_white(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8 with transparency as (H, W, 3) uint8 on white."""
    share = pixels[..., 3:].astype(np.uint16)
    return ((pixels[..., :3] * share + 255 * (255 - share) + 127) // 255).astype(np.uint8)


def display_matrix(frame: Any) -> tuple[int, ...] | None:
    """The nine numbers that say how a video is turned and mirrored; None where it is to be shown as it is.

    To be asked of one frame only: PyAV keeps frames that were asked for such data until Python looks for cycles, which
    for large frames is too late.
    """
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            return tuple(np.frombuffer(bytes(data)[:36], np.int32).tolist())
    return None


def upright(pixels: np.ndarray, matrix: Sequence[int] | None) -> np.ndarray:
    """Pixels (H, W, 3) turned and mirrored by a display matrix, to the nearest quarter.

    The matrix maps a place (x, y) to (a x + c y, b x + d y), in the order a, b, u, c, d, v, x, y, w.
    """
    if matrix is None:
        return pixels
    a, b, _, c, d = matrix[:5]
    across, down = (a, d)
    if _is_quarter(matrix):
        pixels, across, down = pixels.transpose(1, 0, 2), c, b  # (H, W, 3) -> (W, H, 3)
    return np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


def shown_size(size: tuple[int, int], aspect: float, matrix: Sequence[int] | None) -> tuple[int, int]:
    """(H, W) in square pixels of a frame that is stored as (H, W) pixels of this aspect, and turned upright."""
    height, width = size[0], max(1, round(size[1] * aspect))
    return (width, height) if _is_quarter(matrix) else (height, width)


def _is_quarter(matrix: Sequence[int] | None) -> bool:
    """Whether width and height change places."""
    return matrix is not None and abs(matrix[0]) + abs(matrix[4]) < abs(matrix[1]) + abs(matrix[3])
