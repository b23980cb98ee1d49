"""Photos and what is known of their objects, read once: what can be used, and what cannot and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from denoising_vit.data import Skipped
from denoising_vit.data.photos import photo_digest, read_photo
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.discovery.boxes import Box
from denoising_vit.evaluation.discovery.images import BoxedImage
from denoising_vit.evaluation.layouts import inspect_all


class Truth(Protocol):
    """What is known of the objects of a photo, wherever it is written."""

    def objects(self, height: int, width: int) -> dict[int, Box]:
        """The boxes of all objects by number, one at least, for a photo of H x W pixels.

        Raises:
            EvaluationError: if there are none, or they do not fit the photo.
        """
        ...


@dataclass(frozen=True)
class Candidate:
    """A photo and its objects, not yet read.

    Attributes:
        id: path of the photo below its folder, with ``/`` between its parts.
        photo: the file of the photo.
        truth: what is known of its objects.
        sequence: of which it is a frame; its id where it stands for itself.
    """

    id: str
    photo: Path
    truth: Truth
    sequence: str


class Inspected(NamedTuple):
    """A photo that can be used, and the numbers of its objects."""

    image: BoxedImage
    numbers: frozenset[int]


def inspect(
    candidates: Sequence[Candidate], progress: Callable[[], None] | None = None
) -> tuple[list[Inspected], list[Skipped]]:
    """Reads every photo and its objects once, so that what cannot be used is known before the work begins.

    Args:
        candidates: in the order that the images shall have.
        progress: called after each.
    """
    return inspect_all(_inspect_one, candidates, progress)


def _inspect_one(candidate: Candidate) -> Inspected:
    photo = read_photo(candidate.photo)
    height, width = photo.shape[:2]
    objects = candidate.truth.objects(height, width)
    image = BoxedImage(
        split="val",
        id=candidate.id,
        photo=candidate.photo,
        height=height,
        width=width,
        digest=photo_digest(photo),
        boxes=tuple(sorted(objects.values())),  # the same truth in another order is the same
        sequence=candidate.sequence,
    )
    return Inspected(image, frozenset(objects))


def check_size(source: Path, said: tuple[int, int] | None, height: int, width: int) -> None:
    """Raises EvaluationError where an annotation says another (H, W) than the photo has; None says nothing."""
    if said is not None and said != (height, width):
        raise EvaluationError(
            f"{source}: boxes are in an image of {said[1]} x {said[0]} pixels, expected the photo's {width} x {height} "
            "(upright, as its EXIF data say); is it another photo, or was it resized?"
        )
