"""Boxes of the annotated objects of a photo: a VOC XML file or a mask."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from xml.etree import ElementTree

import numpy as np

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import Box
from denoising_vit.evaluation.layouts import check_same_size, read_text
from denoising_vit.evaluation.masks import MAX_OBJECTS, WHITE, read_values

#: Maximum size of an XML file in bytes; VOC's have a few thousand.
_MAX_XML_BYTES = 10_000_000

#: Pixels that a box may reach beyond the image, by rounding.
_SLACK = 1.0

#: x0, y0, x1, y1 in elements of a mask, pixels or patches; half-open.
CellBox = tuple[int, int, int, int]


class Annotation(Protocol):
    """The annotated objects of a photo."""

    def objects(self, height: int, width: int) -> dict[int, Box]:
        """Boxes of all objects by number, at least one, for a photo of H x W pixels.

        Raises:
            EvaluationError: if there are none, or they do not fit the photo.
        """
        ...


def box_around(mask: np.ndarray) -> CellBox:
    """The smallest box around the true elements of a mask (h, w), at least one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def within(box: Box, height: int, width: int) -> Box:
    """Clip an annotated box to the image, if it reaches beyond it by a pixel at most.

    Raises:
        EvaluationError: if it reaches further, has no area, or is not finite.
    """
    x0, y0, x1, y1 = box
    name = f"the box x {x0:g} to {x1:g}, y {y0:g} to {y1:g}"
    if not all(map(math.isfinite, box)):
        raise EvaluationError(f"{name} is not finite")
    kept = _clip(x0, width), _clip(y0, height), _clip(x1, width), _clip(y1, height)
    if max(abs(before - after) for before, after in zip(box, kept, strict=True)) > _SLACK:
        raise EvaluationError(
            f"{name} is not within the image of {width} x {height} pixels; expected 0 to {width} and 0 to {height}, "
            "with a tolerance of one pixel. Does the annotation belong to another photo?"
        )
    if kept[0] >= kept[2] or kept[1] >= kept[3]:
        raise EvaluationError(f"{name} has no area in the image of {width} x {height} pixels")
    return kept


def _clip(place: float, size: int) -> float:
    return min(max(0.0, place), float(size))


def fitting_boxes(
    source: Path, size: tuple[int, int] | None, height: int, width: int, boxes: Iterable[Box]
) -> dict[int, Box]:
    """Numbered boxes of a file, if it is about a photo of H x W pixels (``size`` is the file's) and they fit it."""
    if size is not None and size != (height, width):
        raise EvaluationError(
            f"{source}: boxes are in an image of {size[1]} x {size[0]} pixels, expected the photo's {width} x {height} "
            "(upright, by its EXIF data); is it another photo, or was it resized?"
        )
    try:
        return {number: within(box, height, width) for number, box in enumerate(boxes)}
    except EvaluationError as error:
        raise EvaluationError(f"{source}: {error}") from error


@dataclass(frozen=True)
class MaskObjects:
    """The objects of a mask that has the photo's size.

    Numbers are those in the mask: 1 to 50, or 255 if it has no other.

    Attributes:
        path: file of the mask.
    """

    path: Path

    def objects(self, height: int, width: int) -> dict[int, Box]:
        """Boxes around all pixels of each object."""
        values = read_values(self.path).astype(np.int64)
        there = np.unique(values)
        wrong = there[((there < 0) | (there > MAX_OBJECTS)) & (there != WHITE)]
        if len(wrong):
            shown = ", ".join(map(str, wrong[:3].tolist())) + (", ..." if len(wrong) > 3 else "")
            raise EvaluationError(
                f"{self.path}: {len(there)} different values, {len(wrong)} of them neither 0, {WHITE} nor numbers of "
                f"objects ({shown}); expected 0 and {WHITE}, or 0 and 1 to {MAX_OBJECTS} with {WHITE} for no object. "
                "Was the mask blurred, or saved as JPEG?"
            )
        check_same_size((height, width), values.shape, self.path)
        numbers = [number for number in there.tolist() if number]
        numbers = [number for number in numbers if number != WHITE] or numbers
        if not numbers:
            raise EvaluationError(f"{self.path}: no object, all {values.size:,} pixels are 0")
        return {number: box_around(values == number) for number in numbers}


@dataclass(frozen=True)
class VocObjects:
    """The objects of a VOC XML file.

    Attributes:
        path: the XML file.
        difficult: include objects marked as difficult or truncated.
    """

    path: Path
    difficult: bool

    def objects(self, height: int, width: int) -> dict[int, Box]:
        """Boxes by their position in the file, which counts pixels from 1 and includes the last one."""
        root = _parsed_xml(self.path)
        every = root.findall("object")
        chosen = [
            one
            for one in every
            if self.difficult or all(_text(one, mark) != "1" for mark in ("difficult", "truncated"))
        ]
        if not chosen:
            only = f"{len(every)} that are all difficult or truncated" if every else "none"
            raise EvaluationError(f"{self.path}: expected objects, found {only}")
        said = [_text(root, f"size/{side}") for side in ("height", "width")]
        rows, columns = (int(side) if side.isdecimal() else 0 for side in said)
        size = (rows, columns) if rows and columns else None
        return fitting_boxes(self.path, size, height, width, map(_xml_box, chosen))


def _parsed_xml(path: Path) -> ElementTree.Element:
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file, expected the objects of the photo as XML")
    if path.stat().st_size > _MAX_XML_BYTES:
        raise EvaluationError(f"{path}: larger than {_MAX_XML_BYTES:,} bytes, expected the objects of one photo as XML")
    text = read_text(path)
    # A document type can declare entities that read other files or expand without end.
    if "<!DOCTYPE" in text:
        raise EvaluationError(f"{path}: expected XML without a document type (<!DOCTYPE ...>); remove it")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise EvaluationError(f"{path}: damaged XML, expected the objects of the photo ({error})") from error
    if root.tag != "annotation":
        raise EvaluationError(f"{path}: expected <annotation> as in VOC, found <{root.tag}>")
    return root


def _text(element: ElementTree.Element, name: str) -> str:
    return (element.findtext(name) or "").strip()


def _xml_box(one: ElementTree.Element) -> Box:
    x0, y0, x1, y1 = (_xml_number(one, side) for side in ("xmin", "ymin", "xmax", "ymax"))
    return x0 - 1, y0 - 1, x1, y1


def _xml_number(one: ElementTree.Element, side: str) -> float:
    text = one.findtext(f"bndbox/{side}")
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise EvaluationError(f"expected a number as {side} of an object's bndbox, found {text!r}")
    return number
