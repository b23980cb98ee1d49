"""Evaluation images and data sets, for any task.

A data set has one or two splits of images. An image holds the paths of its photo and ground truth and reads them on
demand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from denoising_vit.data import Skipped
from denoising_vit.data.photos import photo_digest, read_photo

#: x0, y0, x1, y1 in pixels, half-open: an image of H x W pixels is 0, 0, W, H.
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class EvaluationImage:
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
        """Digest of the ground truth, independent of file formats."""
        raise NotImplementedError

    def pixels(self) -> np.ndarray:
        """Read the photo, (H, W, 3) uint8.

        Raises:
            PhotoError: if it can no longer be read.
        """
        return read_photo(self.photo)


def described(split: str, id: str, photo: Path, pixels: np.ndarray) -> dict[str, Any]:
    """The attributes of :class:`EvaluationImage` for a photo with these pixels (H, W, 3)."""
    height, width = pixels.shape[:2]
    digest = photo_digest(pixels)
    return {"split": split, "id": id, "photo": photo, "height": height, "width": width, "digest": digest}


Image = TypeVar("Image", bound=EvaluationImage, covariant=True)


@dataclass(frozen=True)
class EvaluationSet(Generic[Image]):
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
        """SHA-256 of ids, photos and ground truth in order, independent of file formats."""
        return _digest(f"{image.id}\0{image.digest}\0{image.truth_digest}\n" for image in self.images)

    @cached_property
    def photos_digest(self) -> str:
        """SHA-256 of ids and photos in order."""
        return _digest(f"{image.id}\0{image.digest}\n" for image in self.images)

    @property
    def common_size(self) -> tuple[int, int] | None:
        """(H, W), if all photos have the same size."""
        sizes = {(image.height, image.width) for image in self.images}
        return sizes.pop() if len(sizes) == 1 else None


def _digest(lines: Iterable[str]) -> str:
    content = hashlib.sha256()
    for line in lines:
        content.update(line.encode(errors="surrogateescape"))  # file names need not be UTF-8
    return content.hexdigest()


Split = TypeVar("Split", bound=EvaluationSet[EvaluationImage], covariant=True)


@dataclass(frozen=True)
class EvaluationData(Generic[Split]):
    """A data set to evaluate on.

    Attributes:
        name: name in tables.
        layout: name of the folder layout.
        splits: ``train`` and ``val``, or ``val`` alone if nothing is trained.
        note: remark for the report.
    """

    name: str
    layout: str
    splits: tuple[Split, ...]
    note: str | None = None

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes that do not occur in the scored images and are left out of means; empty without classes."""
        return ()

    @property
    def train(self) -> Split:
        """Training images."""
        return self.splits[0]

    @property
    def val(self) -> Split:
        """Scored images."""
        return self.splits[-1]


def shared_photos(train: EvaluationSet[EvaluationImage], val: EvaluationSet[EvaluationImage]) -> str | None:
    """Note on photos that are in both splits; None if there are none."""
    known = {image.digest for image in train.images}
    count = sum(image.digest in known for image in val.images)
    return f"{count} of {len(val.images)} photos of val are also in train" if count else None
