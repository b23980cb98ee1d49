"""Large pictures: decoded as a whole, or read region by region if their format allows it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from denoising_vit.data.photos import MAX_PIXELS, explained, open_image, photo_digest, read_photo, refuse_larger
from denoising_vit.errors import PhotoError
from denoising_vit.files import file_digest, needed

#: Number of pixels to read at once when shrinking a picture.
_AT_ONCE = 1 << 24

#: Maximum side in pixels of a drawn picture, unless it is already in memory.
_DRAWN = 2048

#: Axes and colours of TIFF files that can be read region by region.
_READ = {("YX", "MINISBLACK"), ("YXS", "RGB"), ("YXS", "YCBCR")}


class TiffPicture:
    """An (H, W, 3) uint8 TIFF file whose regions are read on request: ``picture[top:bottom, left:right]``.

    Args:
        path: the file.
        size: minimum (H, W) needed; in a pyramid, the smallest level that covers it is read.

    Attributes:
        path: the file.
        shape: (H, W, 3).

    Raises:
        PhotoError: if tifffile is not installed, or the file is not upright grey or RGB with 8 or 16 bits.
    """

    def __init__(self, path: Path, size: tuple[int, int] | None = None) -> None:
        tifffile = needed("tifffile", "tiff", PhotoError)
        import zarr

        self.path = path
        with explained(str(path)):
            series = tifffile.TiffFile(path).series[0]
            page = series.keyframe
            fitting = [at for at, level in enumerate(series.levels) if size is not None and _covers(level.shape, size)]
            at = max(fitting, default=0)
            level = series.levels[at]
            self._pixels: Any = zarr.open_array(series.aszarr(level=at), mode="r")
            orientation = page.tags.get(ExifTags.Base.Orientation)
        turned = orientation is not None and orientation.value != 1
        known = (level.axes, page.photometric.name) in _READ and level.dtype in (np.uint8, np.uint16)
        if turned or not known:
            raise PhotoError(
                f"{path}: {level.dtype} {page.photometric.name} of axes {level.axes}{', rotated' * turned}; expected "
                "an upright TIFF, grey or interleaved RGB with 8 or 16 bits, to read it tile by tile. Convert it first"
            )
        self.shape = (*self._pixels.shape[:2], 3)

    def __getitem__(self, region: tuple[slice, slice]) -> np.ndarray:
        """The pixels of a region, (h, w, 3) uint8; the upper 8 bits of 16, with transparency over white."""
        with explained(str(self.path)):
            pixels = np.asarray(self._pixels[region])
        if pixels.dtype == np.uint16:
            pixels = (pixels >> 8).astype(np.uint8)
        if pixels.ndim == 2:
            return np.repeat(pixels[..., None], 3, axis=-1)
        if pixels.shape[2] == 4:
            opaque = pixels[..., 3:] / np.float32(255)
            return (pixels[..., :3] * opaque + 255 * (1 - opaque)).round().astype(np.uint8)
        return pixels[..., :3]


#: An array (H, W, 3) uint8, or an object that is sliced like one.
Picture = np.ndarray | TiffPicture


def open_picture(
    source: str | Path | Image.Image | np.ndarray,
    *,
    size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    whole: int = MAX_PIXELS,
) -> Picture:
    """Open a picture of any size.

    Pillow decodes it as a whole, 3 bytes per pixel, with two exceptions: a TIFF of more than ``whole`` pixels is read
    region by region, which needs tifffile; and a JPEG of more than ``max_pixels`` is decoded at a half, a quarter or an
    eighth of its sides if ``size`` needs no more.

    Args:
        source: as for :func:`read_photo`.
        size: (H, W) at which it will be used; defaults to its own.
        max_pixels: maximum size; larger pictures raise PhotoError.
        whole: maximum size of TIFF files to decode as a whole.

    Raises:
        PhotoError: if it is missing, damaged, too large, not an image, or needs tifffile, which is not installed.
    """
    if isinstance(source, str | Path) and (declared := _tiff_pixels(Path(source))) > whole:
        if declared > max_pixels:
            with open_image(Path(source)) as image:
                refuse_larger(image, str(source), max_pixels)
        return TiffPicture(Path(source), size)
    return read_photo(source, max_pixels=max_pixels, size=size)


def picture_digest(picture: Picture) -> str:
    """SHA-256 of the pixels of an array, or of a file that is read region by region."""
    return photo_digest(picture) if isinstance(picture, np.ndarray) else file_digest(picture.path)


def reduced(picture: Picture, side: int) -> np.ndarray:
    """Shrink a picture by an integer factor to at most ``side`` pixels, by means over squares, in parts."""
    height, width = picture.shape[:2]
    factor = math.ceil(max(height, width) / side)
    band = factor * max(_AT_ONCE // (factor * width), 1)
    tops = range(0, height, band)
    return np.concatenate(
        [np.asarray(Image.fromarray(picture[top : top + band, 0:width]).reduce(factor)) for top in tops]
    )


def drawable(picture: Picture) -> np.ndarray:
    """The picture (H, W, 3) uint8 for drawing, shrunk if it is not in memory."""
    return picture if isinstance(picture, np.ndarray) else reduced(picture, _DRAWN)


def _tiff_pixels(path: Path) -> int:
    """Number of pixels that a TIFF file declares; 0 for any other file, whose errors :func:`read_photo` reports."""
    try:
        with open_image(path) as image:
            return image.width * image.height if image.format == "TIFF" else 0
    except Exception:
        return 0


def _covers(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    return shape[0] >= size[0] and shape[1] >= size[1]
