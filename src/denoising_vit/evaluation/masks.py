"""Index masks: reading them, and the meaning of their values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from denoising_vit.data.photos import MAX_PIXELS, raw_mode, use_image
from denoising_vit.errors import EvaluationError

#: Label of pixels without a class.
NO_LABEL = -1

#: Pillow modes with numbers instead of colours; for palette images, the indices.
_INDEX_MODES = frozenset({"1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N"})

#: Factor by which Pillow scales grayscale of 2 or 4 bits, which some PNG optimizers write.
_STRETCHED = {"L;2": 85, "L;4": 17}


@dataclass(frozen=True)
class Coding:
    """Meaning of the values in a data set's masks.

    Attributes:
        classes: number of classes, K.
        source: where the list of classes is from, for messages.
        shift: value of the first class; 1 if 0 means no label, as in ADE20K.
        ignored: values that mean no label.
    """

    classes: int
    source: str
    shift: int = 0
    ignored: tuple[int, ...] = (255,)

    def decoded(self, values: np.ndarray, name: str) -> np.ndarray:
        """Values of a mask (H, W) -> classes (H, W) int64: 0 to K - 1, and NO_LABEL.

        Raises:
            EvaluationError: with the mask's name, if it has other values.
        """
        labels = values.astype(np.int64) - self.shift
        outside = (labels < 0) | (labels >= self.classes)
        for value in self.ignored:
            chosen = values == value
            labels[chosen] = NO_LABEL
            outside &= ~chosen
        if outside.any():
            raise EvaluationError(self._complaint(values[outside], name))
        return labels

    def _complaint(self, outside: np.ndarray, name: str) -> str:
        found, counts = np.unique(outside, return_counts=True)
        most = int(counts.argmax())
        others = f", and {len(found) - 1} more such labels" if len(found) > 1 else ""
        pixels = f"{counts[most]:,} pixel{'s' if counts[most] > 1 else ''}"
        last = self.shift + self.classes - 1
        return (
            f"{name}: label {found[most]} in {pixels}{others}; expected {self.shift} to {last} for the "
            f"{self.classes} classes of {self.source}, or {' or '.join(map(str, sorted(self.ignored)))} for no label. "
            "Correct the mask or the list of classes"
        )


def read_mask(path: Path, coding: Coding) -> np.ndarray:
    """Read a mask as classes (H, W) int64 in 0 to K - 1, NO_LABEL for pixels without a class."""
    return coding.decoded(read_values(path), str(path))


def read_values(path: Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read the values (H, W) of an index image.

    Palette colours are ignored. A 1-bit image returns bool.

    Raises:
        EvaluationError: if the file is missing, empty, damaged, too large or not an index image.
    """
    if path.is_dir():
        raise EvaluationError(f"{path} is a directory, expected a mask")
    if not path.exists():
        raise EvaluationError(f"{path}: no such file, expected a mask")
    if path.stat().st_size == 0:
        raise EvaluationError(f"{path}: the file is empty (0 bytes), expected a mask")
    try:
        return use_image(path, lambda image: _numbers(image, path, max_pixels))
    except EvaluationError:
        raise
    except UnidentifiedImageError as error:
        raise EvaluationError(f"{path}: not an image file that can be read, expected a mask as PNG or TIFF") from error
    except Image.DecompressionBombError as error:
        raise EvaluationError(f"{path}: more pixels than the limit of {max_pixels:,}; shrink the mask first") from error
    except Exception as error:  # decoders raise many types of errors for damaged files
        raise EvaluationError(f"{path}: damaged or unreadable mask ({error})") from error


def _numbers(image: Image.Image, path: Path, max_pixels: int) -> np.ndarray:
    """Values of an opened mask, after checking its header."""
    _check_header(image, path, max_pixels)
    stretch = _STRETCHED.get(raw_mode(image), 1)  # only available before decoding
    return np.asarray(image) // stretch if stretch > 1 else np.asarray(image)


def _check_header(image: Image.Image, path: Path, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise EvaluationError(
            f"{path}: {width:,} x {height:,} pixels exceed the limit of {max_pixels:,}; shrink the mask first"
        )
    if image.mode not in _INDEX_MODES:
        raise EvaluationError(
            f"{path}: expected an index image (grayscale or palette, with class numbers as values), got mode "
            f"{image.mode}; write class numbers instead of colours"
        )
    if image.format in ("JPEG", "MPO"):
        raise EvaluationError(
            f"{path}: expected a lossless format, got JPEG, which changes class numbers; write the mask as PNG"
        )


# --- masks of objects ---

#: The object in masks of 0 and 255 (DAVIS 2016); no object in masks with numbered objects (DAVIS 2017).
WHITE = 255

#: Maximum number of objects in a mask; more values mean shades of grey.
MAX_OBJECTS = 50

#: Number of mask values that a message shows.
_SHOWN = 5


@dataclass(frozen=True)
class Objects:
    """The objects of a sequence: those in its first mask, because labels can only be propagated from there.

    Attributes:
        numbers: numbers of the objects in order; 1 for black and white masks.
        binary: True for black and white masks, where 255 is the object. Other masks have the objects' numbers, and 255
            means no label.
    """

    numbers: tuple[int, ...]
    binary: bool

    @classmethod
    def first(cls, values: np.ndarray, name: str) -> Objects:
        """The objects in the values (H, W) of a first mask, called ``name`` in errors.

        Raises:
            EvaluationError: if there are none, or the values are neither black and white nor object numbers.
        """
        there = np.unique(values).tolist()
        numbers = [value for value in there if value not in (0, WHITE)]
        if not numbers and WHITE not in there:
            raise EvaluationError(f"{name}: the first mask is empty; expected at least one object")
        # In masks with shades of grey (after smoothing, for example), 255 is white and does not mean no label.
        gray = WHITE in there and numbers != list(range(1, len(numbers) + 1))
        if gray or any(not 0 < number <= MAX_OBJECTS for number in numbers):
            raise EvaluationError(_unexpected(there, name))
        return cls(tuple(numbers) or (1,), not numbers)

    def labels(self, values: np.ndarray, name: str) -> tuple[np.ndarray, tuple[int, ...]]:
        """Labels of the values (H, W) of a mask, called ``name`` in errors.

        Returns:
            Labels (H, W) int64: object numbers, 0 elsewhere, NO_LABEL for pixels without a label; and numbers in this
            mask that are not in the first one.

        Raises:
            EvaluationError: if the sequence's masks cannot have these values.
        """
        there = np.unique(values).tolist()
        allowed = {0, WHITE} if self.binary else {*range(MAX_OBJECTS + 1), WHITE}
        if not allowed.issuperset(there):
            raise EvaluationError(_unexpected(there, name))
        if self.binary:
            return (values == WHITE).astype(np.int64), ()
        labels = np.where(np.isin(values, self.numbers), values, 0)
        labels[values == WHITE] = NO_LABEL
        return labels, tuple(value for value in there if value not in (0, WHITE, *self.numbers))


def _unexpected(there: list[int], name: str) -> str:
    more = ", ..." if len(there) > _SHOWN else ""
    return (
        f"{name}: {len(there)} values ({', '.join(map(str, there[:_SHOWN]))}{more}); expected 0 and 255, or object "
        f"numbers from 1 to at most {MAX_OBJECTS} (0 for the background, 255 for no label). Write the mask as PNG, "
        "without smoothing"
    )


def mask_values(path: Path) -> np.ndarray:
    """Values of a mask (H, W) int64; 0 and 255 for a 1-bit mask."""
    values = read_values(path)
    return values.astype(np.int64) * (WHITE if values.dtype == bool else 1)
