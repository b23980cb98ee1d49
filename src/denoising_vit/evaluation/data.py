"""Photos to evaluate on, whatever the task.

A data set has one or two splits of images. An image knows its photo and ground truth, and reads them when needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np

from denoising_vit.data import Skipped
from denoising_vit.data.photos import read_photo


@dataclass(frozen=True)
class JudgedImage:
    """A photo; subclasses add its ground truth.

    Attributes:
        split: ``train`` or ``val``.
        id: path of the photo below the folder of its split's photos, with ``/`` as separator.
        photo: file of the photo.
        height: height in pixels, H.
        width: width in pixels, W.
        digest: digest of the photo's pixels.
    """

    split: str
    id: str
    photo: Path
    height: int
    width: int
    digest: str

    @property
    def truth_digest(self) -> str:
        """Digest of the ground truth, whatever its files."""
        raise NotImplementedError

    def pixels(self) -> np.ndarray:
        """Read the photo, (H, W, 3) uint8.

        Raises:
            PhotoError: if it can no longer be read.
        """
        return read_photo(self.photo)


Image = TypeVar("Image", bound=JudgedImage, covariant=True)


@dataclass(frozen=True)
class JudgedSet(Generic[Image]):
    """One split, in a fixed order.

    Attributes:
        split: ``train`` or ``val``.
        images: usable images.
        skipped: entries that could not be used, with reasons.
    """

    split: str
    images: tuple[Image, ...]
    skipped: tuple[Skipped, ...] = field(default=(), kw_only=True)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of ids, photos and ground truth in order, whatever the file formats."""
        return _digest(f"{image.id}\0{image.digest}\0{image.truth_digest}\n" for image in self.images)

    @cached_property
    def photos_digest(self) -> str:
        """SHA-256 of ids and photos in order."""
        return _digest(f"{image.id}\0{image.digest}\n" for image in self.images)

    @property
    def common_size(self) -> tuple[int, int] | None:
        """(H, W), if all photos share it."""
        sizes = {(image.height, image.width) for image in self.images}
        return sizes.pop() if len(sizes) == 1 else None


def _digest(lines: Iterable[str]) -> str:
    content = hashlib.sha256()
    for line in lines:
        content.update(line.encode(errors="surrogateescape"))  # file names need not be UTF-8
    return content.hexdigest()


class JudgedData(Protocol):
    """A data set to evaluate on."""

    @property
    def name(self) -> str:
        """Name in tables."""
        ...

    @property
    def layout(self) -> str:
        """Name of the folder layout."""
        ...

    @property
    def note(self) -> str | None:
        """Remark for readers of the results."""
        ...

    @property
    def splits(self) -> tuple[JudgedSet[JudgedImage], ...]:
        """The splits; the last one is scored."""
        ...

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes that do not occur in the scored images, left out of means."""
        ...


def shared_photos(train: JudgedSet[JudgedImage], val: JudgedSet[JudgedImage]) -> str | None:
    """Remark on photos that are in both splits; None if there are none."""
    known = {image.digest for image in train.images}
    count = sum(image.digest in known for image in val.images)
    return f"{count} of {len(val.images)} photos of val are in train as well" if count else None


@dataclass(frozen=True)
class SplitData(Generic[Image]):
    """A data set without classes.

    Attributes:
        name: name in tables.
        layout: name of the folder layout.
        splits: ``train`` and ``val``, or ``val`` alone if nothing is trained.
        note: remark for readers of the results.
    """

    name: str
    layout: str
    splits: tuple[JudgedSet[Image], ...]
    note: str | None = None

    @property
    def absent(self) -> tuple[str, ...]:
        """Empty: there are no classes."""
        return ()

    @property
    def train(self) -> JudgedSet[Image]:
        """Training images."""
        return self.splits[0]

    @property
    def val(self) -> JudgedSet[Image]:
        """Scored images."""
        return self.splits[-1]
