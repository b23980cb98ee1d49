"""The pixels of an opened image: upright, of three channels of 8 bits, whatever its metadata say."""

from __future__ import annotations

import io
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from denoising_vit.errors import DenoisingVitWarning, PhotoError

#: How a picture with this EXIF orientation is turned upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112

_PNG = b"\x89PNG\r\n\x1a\n"

#: Chunks of a PNG file that decide its picture, which its EXIF may turn.
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")

#: The TIFF tag that declares the largest value.
_LARGEST_SAMPLE = 281


def decoded(image: Image.Image, name: str) -> np.ndarray:
    """The picture (H, W, 3) uint8 of an image whose header alone was read.

    Args:
        image: of any mode.
        name: what errors and warnings call it.

    Raises:
        PhotoError: if its values have no agreed meaning as a picture.
    """
    deep = ";16" in raw_mode(image)  # to be asked before decoding
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
            f"{name}: colours of 16 bits whose values end below {256 * (largest + 1):,} of 65,535; it would be nearly "
            "black. Scale its values to 16 bits, or convert it to 8 bits first"
        )
    return pixels


def without_metadata(file: Path | io.BytesIO) -> io.BytesIO | None:
    """A PNG file without all that its picture does not need; None if it is no PNG file."""
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
    """How the file holds its pixels, such as RGB;16B."""
    tiles = getattr(image, "tile", [])
    mode = tiles[0][3] if tiles else ""
    return str(mode[0] if isinstance(mode, tuple) else mode)


def _declared_largest(image: Image.Image) -> int | None:
    """The largest value that a TIFF file declares, if it does."""
    if raw_mode(image).startswith("I;12"):
        return 4095
    try:
        found = image.tag_v2[_LARGEST_SAMPLE] if isinstance(image, TiffImageFile) else None
        return int(found[0] if isinstance(found, tuple) else found) if found else None
    except Exception:  # broken or missing, as metadata may be
        return None


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; broken EXIF says nothing."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # parsers meet broken metadata with all kinds
        turn = None
    return image if turn is None else image.transpose(turn)


def _from_deep_grayscale(pixels: np.ndarray, name: str, declared: int | None) -> np.ndarray:
    """16-bit (or 0 to 1 float) grayscale to RGB; other ranges have no agreed meaning as a picture."""
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
    """The value of white in grayscale of up to 16 bits whose largest value is ``high``."""
    if declared is not None and high <= declared <= 65535:
        return declared
    bits = next(bits for bits in (8, 10, 12, 14, 16) if high < 1 << bits)
    if bits < 16 and high:
        words = f"{name}: no value of its 16 bits is above {high:,}; read as {bits} bits ({(1 << bits) - 1:,} is white)"
        warnings.warn(words, DenoisingVitWarning, stacklevel=2)
    return (1 << bits) - 1
