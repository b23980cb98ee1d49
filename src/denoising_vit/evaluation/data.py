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
    """One photo, inspected once and read again when it is needed; subclasses add what is known of it.

    Attributes:
        split: ``train`` or ``val``.
        id: path of the photo below the folder of its split's photos, with ``/`` between its parts.
        photo: the file of the photo.
        height: in pixels, H.
        width: in pixels, W.
        digest: of the photo's pixels.
    """

    split: str
    id: str
    photo: Path
    height: int
    width: int
    digest: str

    @property
    def truth_digest(self) -> str:
        """Of what is known of the photo; the same for the same truth, however it lies on the disk."""
        raise NotImplementedError

    def pixels(self) -> np.ndarray:
        """The photo, (H, W, 3) uint8.

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
        images: those that can be used.
        skipped: what cannot be used, and why.
    """

    split: str
    images: tuple[Image, ...]
    skipped: tuple[Skipped, ...] = field(default=(), kw_only=True)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of ids, photos and truth in their order; files that decode to the same give the same."""
        return _digest(f"{image.id}\0{image.digest}\0{image.truth_digest}\n" for image in self.images)

    @cached_property
    def photos_digest(self) -> str:
        """SHA-256 of ids and photos in their order, whatever is known of them."""
        return _digest(f"{image.id}\0{image.digest}\n" for image in self.images)

    @property
    def common_size(self) -> tuple[int, int] | None:
        """(H, W), if all photos share it."""
        sizes = {(image.height, image.width) for image in self.images}
        return sizes.pop() if len(sizes) == 1 else None


def _digest(lines: Iterable[str]) -> str:
    content = hashlib.sha256()
    for line in lines:
        content.update(line.encode(errors="surrogateescape"))  # names of files need not be UTF-8
    return content.hexdigest()


class JudgedData(Protocol):
    """A data set with all that it is judged on."""

    @property
    def name(self) -> str:
        """For tables."""
        ...

    @property
    def layout(self) -> str:
        """How it lies on the disk."""
        ...

    @property
    def note(self) -> str | None:
        """What a reader of the results should know, if anything."""
        ...

    @property
    def splits(self) -> tuple[JudgedSet[JudgedImage], ...]:
        """The images that are looked at; the last are those that scores are of."""
        ...

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes that no judged image has, left out of means."""
        ...


def shared_photos(train: JudgedSet[JudgedImage], val: JudgedSet[JudgedImage]) -> str | None:
    """What a reader should know of photos that are in both splits; None where there are none."""
    known = {image.digest for image in train.images}
    count = sum(image.digest in known for image in val.images)
    return f"{count} of {len(val.images)} photos of val are in train as well" if count else None


@dataclass(frozen=True)
class SplitData(Generic[Image]):
    """A data set without classes.

    Attributes:
        name: for tables.
        layout: how it lies on the disk.
        splits: ``train`` and ``val``, or ``val`` alone where nothing is learned.
        note: what a reader of the results should know, if anything.
    """

    name: str
    layout: str
    splits: tuple[JudgedSet[Image], ...]
    note: str | None = None

    @property
    def absent(self) -> tuple[str, ...]:
        """None: there are no classes."""
        return ()

    @property
    def train(self) -> JudgedSet[Image]:
        """What is learned from."""
        return self.splits[0]

    @property
    def val(self) -> JudgedSet[Image]:
        """What is judged."""
        return self.splits[-1]
