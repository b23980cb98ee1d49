"""From a file to pixels: every kind of image file becomes an (H, W, 3) uint8 array, or a clear error."""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from denoising_vit.data.decoding import decoded, without_metadata
from denoising_vit.errors import DenoisingVitError, PhotoError

_T = TypeVar("_T")

#: Largest photo that is decoded, in pixels; a decoded photo takes 3 bytes a pixel, its float copy 12.
MAX_PIXELS = 100_000_000

#: What pictures of results name as their software, so that they are not taken for photos.
PANEL_SOFTWARE = "denoising-vit panel"

#: Pillow's limit is one variable of the process.
_PILLOW_LOCK = threading.RLock()

#: Formats that are read. Pillow has more, among them some that start other programs (EPS) or are rarely tested.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")

#: Endings that a folder is searched for: all that Pillow gives to these formats.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".gif"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".avif", ".avifs"}
)


def read_photo(source: str | Path | Image.Image | np.ndarray, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads a photo as (H, W, 3) uint8, turned upright by its EXIF orientation.

    Grayscale, palette and CMYK become RGB; transparency is laid over white; of an animation the first frame is taken.
    Grayscale of 16 bits is scaled to 8: by the largest value that a TIFF declares, else by the fewest of 8, 10, 12, 14
    and 16 bits that hold its values, with a warning where these are fewer than 16. Broken metadata are ignored.

    Args:
        source: a path, a PIL image, or an (H, W, 3) uint8 array (returned as it is).
        max_pixels: photos with more pixels are refused before they are decoded.

    Raises:
        PhotoError: if the file is missing, empty, damaged, too large, or no image.
    """
    if isinstance(source, np.ndarray):
        return _checked_array(source)
    if isinstance(source, Image.Image):
        return _guarded(lambda: _decode(source, "the image", max_pixels), "the image")
    path = Path(source)
    return _guarded(lambda: _read_file(path, max_pixels), str(path))


def read_photo_bytes(content: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """As :func:`read_photo`, from the content of a file, wherever it came from.

    Args:
        content: the whole file.
        name: what errors call it.
        max_pixels: photos with more pixels are refused before they are decoded.

    Raises:
        PhotoError: if the content is empty, damaged, too large, or no image.
    """
    return _guarded(lambda: _read_content(content, name, max_pixels), name)


def is_panel(path: Path) -> bool:
    """Whether a file is a picture that this package drew of a result."""
    return path.suffix.lower() == ".png" and _names_panel_software(path)


def is_panel_start(content: bytes) -> bool:
    """As :func:`is_panel`, from the first kilobyte of a PNG file: what wrote it stands before the pixels."""
    return _names_panel_software(io.BytesIO(content))


def _names_panel_software(file: Path | io.BytesIO) -> bool:
    try:
        with open_image(file) as image:  # of a large photo no pixel is decoded here
            return image.info.get("Software") == PANEL_SOFTWARE
    except Exception:  # whatever it is, it is none of ours
        return False


def _guarded(read: Callable[[], np.ndarray], name: str) -> np.ndarray:
    try:
        return read()
    except PhotoError:
        raise
    except UnidentifiedImageError as error:
        raise PhotoError(f"{name}: not an image file that can be read (JPEG, PNG, WebP, TIFF, ...)") from error
    except Image.DecompressionBombError as error:
        raise PhotoError(f"{name}: too large to decode safely; shrink it first") from error
    except Exception as error:  # decoders meet damaged files with all kinds: OSError, SyntaxError, RuntimeError, ...
        raise PhotoError(f"{name}: damaged or unreadable image ({error})") from error


def _read_file(path: Path, max_pixels: int) -> np.ndarray:
    if not path.exists():
        raise PhotoError(f"{path}: no such file")
    if path.is_dir():
        raise PhotoError(f"{path} is a directory, expected an image file")
    if path.stat().st_size == 0:
        raise PhotoError(f"{path}: the file is empty (0 bytes)")
    return use_image(path, lambda image: _decode(image, str(path), max_pixels))


def _read_content(content: bytes, name: str, max_pixels: int) -> np.ndarray:
    if not content:
        raise PhotoError(f"{name}: the file is empty (0 bytes)")
    return use_image(io.BytesIO(content), lambda image: _decode(image, name, max_pixels))


def open_image(file: Path | io.BytesIO) -> Image.Image:
    """Opens an image file of one of FORMATS, whatever its ending; reads the header only.

    Raises:
        UnidentifiedImageError: if it is none of these.
    """
    Image.init()
    with _without_pillow_limit():
        return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def use_image(file: Path | io.BytesIO, use: Callable[[Image.Image], _T]) -> _T:
    """What ``use`` makes of an image file whose header was read; a PNG with broken metadata is read without them.

    Raises:
        UnidentifiedImageError: if it is none of FORMATS.
        Exception: of any kind that a decoder or ``use`` raises.
    """
    try:
        with open_image(file) as image:
            return use(image)
    except DenoisingVitError:
        raise
    except Exception:
        plain = without_metadata(file)
        if plain is None:
            raise
        with contextlib.suppress(Exception), open_image(plain) as image:
            return use(image)
        raise


@contextlib.contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Pillow's limit on pixels gives way to ours, which is checked before decoding and whose message has a remedy."""
    with _PILLOW_LOCK:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def photo_digest(pixels: np.ndarray) -> str:
    """SHA-256 of a photo's pixels and shape: the same picture, whatever file it came in."""
    return hashlib.sha256(str(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _decode(image: Image.Image, name: str, max_pixels: int) -> np.ndarray:
    width, height = image.size
    if width * height > max_pixels:
        raise PhotoError(
            f"{name}: {width:,} x {height:,} pixels is more than the limit of {max_pixels:,}; shrink it first"
        )
    return decoded(image, name)


def _checked_array(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise PhotoError(f"expected an (H, W, 3) uint8 array, got shape {pixels.shape} of {pixels.dtype}")
    return pixels
