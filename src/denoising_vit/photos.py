"""From a file to pixels: every kind of image file becomes an (H, W, 3) uint8 array, or a clear error."""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from denoising_vit.errors import PhotoError

#: Largest photo that is decoded, in pixels; a decoded photo takes 3 bytes a pixel, its float copy 12.
MAX_PIXELS = 100_000_000

#: What pictures of results name as their software, so that they are not taken for photos.
PANEL_SOFTWARE = "denoising-vit panel"

#: Pillow's limit is one variable of the process.
_PILLOW_LOCK = threading.RLock()

#: Endings that a folder is searched for.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}
)


def read_photo(source: str | Path | Image.Image | np.ndarray, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads a photo as (H, W, 3) uint8, turned upright by its EXIF orientation.

    Grayscale, palette and CMYK become RGB; transparency is laid over white; 16-bit grayscale is scaled to 8 bits; of
    an animation the first frame is taken.

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
        with _without_pillow_limit(), Image.open(file) as image:  # of a large photo no pixel is decoded here
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
    return _open_and_decode(path, str(path), max_pixels)


def _read_content(content: bytes, name: str, max_pixels: int) -> np.ndarray:
    if not content:
        raise PhotoError(f"{name}: the file is empty (0 bytes)")
    return _open_and_decode(io.BytesIO(content), name, max_pixels)


def _open_and_decode(file: Path | io.BytesIO, name: str, max_pixels: int) -> np.ndarray:
    with _without_pillow_limit():
        image = Image.open(file)  # reads the header only
    with image:
        return _decode(image, name, max_pixels)


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
            f"{name}: {width:,} x {height:,} pixels is more than the limit of {max_pixels:,}; shrink it first, "
            "or raise max_pixels if you trust its source"
        )
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I", "F"):
        return _from_deep_grayscale(np.asarray(image), name)
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _from_deep_grayscale(pixels: np.ndarray, name: str) -> np.ndarray:
    """16-bit (or 0 to 1 float) grayscale to RGB; other ranges have no agreed meaning as a picture."""
    low, high = (float(pixels.min()), float(pixels.max())) if pixels.size else (0.0, 0.0)
    if pixels.dtype.kind == "f" and low >= 0 and high <= 1:
        scaled = pixels * 255
    elif pixels.dtype.kind in "iu" and low >= 0 and high <= 65535:
        scaled = pixels / 257
    else:
        raise PhotoError(
            f"{name}: {pixels.dtype} grayscale with values {low:g} to {high:g}; expected 0 to 65535, or 0 to 1 for "
            "floats. Convert it to 8 bits first"
        )
    return np.repeat(np.round(scaled).astype(np.uint8)[..., None], 3, axis=-1)


def _checked_array(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise PhotoError(f"expected an (H, W, 3) uint8 array, got shape {pixels.shape} of {pixels.dtype}")
    return pixels
