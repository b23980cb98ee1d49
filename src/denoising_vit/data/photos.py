"""Decoding of image files to upright (H, W, 3) uint8 arrays."""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from denoising_vit.errors import DenoisingVitError, DenoisingVitWarning, PhotoError

_T = TypeVar("_T")

#: Maximum photo size in pixels; a decoded photo takes 3 bytes per pixel, its float copy 12.
MAX_PIXELS = 100_000_000

#: ``Software`` metadata of pictures drawn by this package, so that they are not used as photos.
PANEL_SOFTWARE = "denoising-vit panel"

#: Guards Pillow's limit, which is global.
_PILLOW_LOCK = threading.RLock()

#: Supported formats. Pillow has others, some of which start other programs (EPS) or are rarely tested.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")

#: Image suffixes in a folder: all that Pillow uses for these formats.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".gif"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".avif", ".avifs"}
)

#: Transposition for each EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG = b"\x89PNG\r\n\x1a\n"

#: PNG chunks needed to decode and rotate an image.
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")

#: TIFF tag of the declared maximum.
_LARGEST_SAMPLE = 281


def read_photo(
    source: str | Path | Image.Image | np.ndarray,
    *,
    max_pixels: int = MAX_PIXELS,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Read a photo as (H, W, 3) uint8, rotated by its EXIF orientation.

    Grayscale, palette and CMYK are converted to RGB; transparent images are composited over white; of animations, the
    first frame is read. 16-bit grayscale is scaled to 8 bits by the maximum declared in a TIFF, or else by the smallest
    of 8, 10, 12, 14 and 16 bits that covers its values, with a warning if below 16. Broken metadata are ignored.

    Args:
        source: a path, a PIL image, or an (H, W, 3) uint8 array, which is returned unchanged.
        max_pixels: maximum size of a photo to decode.
        size: (H, W) that is needed. A JPEG above the limit is then decoded at a half, a quarter or an eighth of its
            sides, if both sides are still at least as long as the longer of these.

    Raises:
        PhotoError: if the file is missing, empty, damaged, too large, or not an image.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise PhotoError(f"expected an (H, W, 3) uint8 array, got shape {source.shape} of {source.dtype}")
        return source
    if isinstance(source, Image.Image):
        with explained("the image"):
            return _decode(source, "the image", max_pixels)
    path = Path(source)
    with explained(str(path)):
        if not path.exists():
            raise PhotoError(f"{path}: no such file")
        if path.is_dir():
            raise PhotoError(f"{path} is a directory, expected an image file")
        if path.stat().st_size == 0:
            raise PhotoError(f"{path}: the file is empty (0 bytes)")
        return use_image(path, lambda image: _decode(image, str(path), max_pixels, size))


def read_photo_bytes(content: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Like :func:`read_photo`, from the contents of a file; ``name`` is for error messages.

    Raises:
        PhotoError: if the contents are empty, damaged, too large, or not an image.
    """
    if not content:
        raise PhotoError(f"{name}: the file is empty (0 bytes)")
    with explained(name):
        return use_image(io.BytesIO(content), lambda image: _decode(image, name, max_pixels))


def is_panel(file: Path | bytes) -> bool:
    """True for a picture drawn by this package, given as a path or as the first kilobyte of a PNG file."""
    if isinstance(file, Path) and file.suffix.lower() != ".png":
        return False
    try:
        with open_image(file if isinstance(file, Path) else io.BytesIO(file)) as image:  # reads the header only
            return image.info.get("Software") == PANEL_SOFTWARE
    except Exception:  # not an image
        return False


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Convert decoder errors to a PhotoError."""
    try:
        yield
    except PhotoError:
        raise
    except UnidentifiedImageError as error:
        raise PhotoError(f"{name}: not an image file that can be read (JPEG, PNG, WebP, TIFF, ...)") from error
    except Image.DecompressionBombError as error:
        raise PhotoError(f"{name}: too large to decode safely; shrink it first") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, RuntimeError, ... for damaged files
        raise PhotoError(f"{name}: damaged or unreadable image ({error})") from error


def open_image(file: Path | io.BytesIO) -> Image.Image:
    """Open an image file in any of FORMATS, with any suffix, reading only the header.

    Raises:
        UnidentifiedImageError: if it has another format.
    """
    Image.init()
    with _without_pillow_limit():
        return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def use_image(file: Path | io.BytesIO, use: Callable[[Image.Image], _T]) -> _T:
    """Call ``use`` with an opened image; if a PNG has broken metadata, the metadata are skipped.

    Raises:
        UnidentifiedImageError: if it has none of FORMATS.
        Exception: any exception of a decoder or of ``use``.
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
    """Disable Pillow's limit on pixels; this package checks its own before decoding, with a better message."""
    with _PILLOW_LOCK:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def photo_digest(pixels: np.ndarray) -> str:
    """SHA-256 of a photo's pixels and shape, independent of its file format."""
    return hashlib.sha256(str(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
    """A photo (H, W, 3) with its longer side at most ``side`` pixels."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    return np.array(image)


def refuse_larger(image: Image.Image, name: str, max_pixels: int) -> None:
    """Raise PhotoError for an opened image that declares too many pixels."""
    width, height = image.size
    if width * height > max_pixels:
        raise PhotoError(
            f"{name}: {width:,} x {height:,} pixels exceed the limit of {max_pixels:,}; shrink it first, or raise the "
            "limit (`dvit denoise --max-pixels`, or max_pixels= in Python)"
        )


def _decode(image: Image.Image, name: str, max_pixels: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an opened image of any mode to (H, W, 3) uint8; ``name`` is for errors and warnings."""
    if size is not None and image.width * image.height > max_pixels:
        image.draft(None, (max(size), max(size)))  # JPEG only; the longer side for both, as it may be rotated
    refuse_larger(image, name, max_pixels)
    deep = ";16" in raw_mode(image)  # only available before decoding
    declared = _declared_largest(image)
    image.load()
    image = _upright(image)
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I", "F"):
        return _from_deep_grayscale(np.asarray(image), name, declared)
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.array(image.convert("RGB"))
    if deep and 0 < (largest := int(pixels.max())) < 64:  # Pillow keeps the upper 8 of 16 bits
        raise PhotoError(
            f"{name}: the 16-bit colour values are below {256 * (largest + 1):,} of 65,535, so the image would be "
            "nearly black. Scale its values to 16 bits, or convert it to 8 bits first"
        )
    return pixels


def without_metadata(file: Path | io.BytesIO) -> io.BytesIO | None:
    """A PNG file reduced to the chunks that decoding needs; None for other files."""
    with file.open("rb") if isinstance(file, Path) else io.BytesIO(file.getvalue()) as stream:
        if stream.read(8) != _PNG:
            return None
        kept = [_PNG]
        while len(head := stream.read(8)) == 8:
            length, kind = int.from_bytes(head[:4]), head[4:]
            if kind not in _PNG_CHUNKS:
                stream.seek(length + 4, io.SEEK_CUR)
                continue
            content = stream.read(length + 4)
            if kind != b"eXIf" or zlib.crc32(kind + content[:-4]) == int.from_bytes(content[-4:]):
                kept += [head, content]
        return io.BytesIO(b"".join(kept))


def raw_mode(image: Image.Image) -> str:
    """Pixel layout in the file, such as RGB;16B."""
    tiles = getattr(image, "tile", [])
    mode = tiles[0][3] if tiles else ""
    return str(mode[0] if isinstance(mode, tuple) else mode)


def _declared_largest(image: Image.Image) -> int | None:
    """The maximum that a TIFF file declares, if any."""
    if raw_mode(image).startswith("I;12"):
        return 4095
    try:
        found = image.tag_v2[_LARGEST_SAMPLE] if isinstance(image, TiffImageFile) else None
        return int(found[0] if isinstance(found, tuple) else found) if found else None
    except Exception:  # broken or missing metadata
        return None


def _upright(image: Image.Image) -> Image.Image:
    """Rotate an image by its EXIF orientation; broken EXIF is ignored."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # parsers raise many kinds of errors for broken metadata
        turn = None
    return image if turn is None else image.transpose(turn)


def _from_deep_grayscale(pixels: np.ndarray, name: str, declared: int | None) -> np.ndarray:
    """Convert 16-bit (or 0 to 1 float) grayscale to RGB; other ranges are ambiguous and raise PhotoError."""
    low, high = (float(pixels.min()), float(pixels.max())) if pixels.size else (0.0, 0.0)
    if pixels.dtype.kind == "f" and low >= 0 and high <= 1:
        scaled = pixels * 255
    elif pixels.dtype.kind in "iu" and low >= 0 and high <= 65535:
        scaled = pixels * (255 / _white(int(high), declared, name))
    else:
        raise PhotoError(
            f"{name}: {pixels.dtype} grayscale with values {low:g} to {high:g}; expected 0 to 65535, or 0 to 1 for "
            "floats. Convert it to 8 bits first"
        )
    return np.repeat(np.round(scaled).astype(np.uint8)[..., None], 3, axis=-1)


def _white(high: int, declared: int | None, name: str) -> int:
    """The value of white in grayscale with a maximum of ``high``."""
    if declared is not None and high <= declared <= 65535:
        return declared
    bits = next(bits for bits in (8, 10, 12, 14, 16) if high < 1 << bits)
    if bits < 16 and high:
        words = f"{name}: no 16-bit value is above {high:,}; read as {bits} bits ({(1 << bits) - 1:,} is white)"
        warnings.warn(words, DenoisingVitWarning, stacklevel=2)
    return (1 << bits) - 1
