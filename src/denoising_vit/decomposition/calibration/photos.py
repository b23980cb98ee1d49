"""Photos of a calibration: by name, and only those that can tell an artifact from content."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from denoising_vit.data import Skipped, find_photos
from denoising_vit.data.photos import photo_digest, read_photo
from denoising_vit.errors import PhotoError

#: A photo whose pixels deviate by less than this (of 255) has no content that moves from crop to crop.
_CONTENT = 1.0

#: Rows and columns of pixels that are looked at, about.
_LOOKED_AT = 512


def named_pixels(photos: Iterable[Any]) -> Iterator[tuple[str, np.ndarray | Skipped]]:
    """Photos as a user gives them, by name: their pixels (H, W, 3) uint8, or why there are none."""
    if isinstance(photos, Image.Image) or (isinstance(photos, np.ndarray) and photos.ndim == 3):
        photos = [photos]  # one photo, not many
    if isinstance(photos, str | Path):
        photos, missing = find_photos([photos])
        yield from ((item.item, item) for item in missing)
    for number, photo in enumerate(photos):
        name = f"photo {number}" if isinstance(photo, np.ndarray | Image.Image) else str(photo)
        try:
            yield name, read_photo(photo)
        except PhotoError as error:
            yield name, Skipped(name, str(error).removeprefix(f"{name}: "))
        except TypeError:
            kind = type(photo).__name__
            yield (f"photo {number}", Skipped(f"photo {number}", f"expected a path, PIL image or array, got {kind}"))


def telling(photos: Iterable[tuple[str, np.ndarray | Skipped]]) -> Iterator[tuple[str, np.ndarray | Skipped]]:
    """The same photos, but for those of one colour and those that were there before.

    The one look the same in every crop, so they cannot tell G from F; the others would agree with themselves.
    """
    seen: dict[str, str] = {}
    for name, pixels in photos:
        if isinstance(pixels, Skipped):
            yield name, pixels
            continue
        digest = photo_digest(pixels)
        if not _has_content(pixels):
            yield name, Skipped(name, "no content: all its pixels are alike")
        elif digest in seen:
            yield name, Skipped(name, f"the same picture as {seen[digest]}")
        else:
            seen[digest] = name
            yield name, pixels


def _has_content(pixels: np.ndarray) -> bool:
    """Whether pixels differ; a part of them tells, and large photos would take gigabytes."""
    rows, columns = (max(side // _LOOKED_AT, 1) for side in pixels.shape[:2])
    return pixels.size > 0 and float(pixels[::rows, ::columns].std(axis=(0, 1)).max()) >= _CONTENT
