"""Objects in the XML files of Pascal VOC."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.discovery.boxes import Box, within
from denoising_vit.evaluation.discovery.inspecting import check_size
from denoising_vit.evaluation.layouts import read_text

#: Largest file that is parsed, in bytes; those of VOC have a few thousand.
_MOST_BYTES = 10_000_000

#: What an object is called that is hard to see or only partly in the photo.
_HARD = ("difficult", "truncated")


@dataclass(frozen=True)
class VocTruth:
    """The objects of one XML file.

    Attributes:
        path: of the file.
        difficult: whether objects count that are marked as difficult or truncated.
    """

    path: Path
    difficult: bool

    def objects(self, height: int, width: int) -> dict[int, Box]:
        """Boxes by their place in the file, which counts pixels from 1 and names the last one inside.

        Raises:
            EvaluationError: if the file is missing, damaged, or none of VOC's; if it has no object that counts, or one
                that is not within a photo of H x W pixels.
        """
        root = _parsed(self.path)
        check_size(self.path, _size(root), height, width)
        every = root.findall("object")
        chosen = every if self.difficult else [one for one in every if not _is_hard(one)]
        if not chosen:
            only = f"{len(every)} that are all difficult or truncated" if every else "none"
            raise EvaluationError(f"{self.path}: expected objects, found {only}")
        try:
            return {number: within(_box(one), height, width) for number, one in enumerate(chosen)}
        except EvaluationError as error:
            raise EvaluationError(f"{self.path}: {error}") from error


def _parsed(path: Path) -> ElementTree.Element:
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file, expected the objects of the photo as XML")
    if path.stat().st_size > _MOST_BYTES:
        raise EvaluationError(f"{path}: larger than {_MOST_BYTES:,} bytes, expected the objects of one photo as XML")
    text = read_text(path)
    # Entities are declared there, which may stand for other files or for texts without end.
    if "<!DOCTYPE" in text:
        raise EvaluationError(f"{path}: expected XML without a document type (<!DOCTYPE ...>); remove it")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise EvaluationError(f"{path}: damaged XML, expected the objects of the photo ({error})") from error
    if root.tag != "annotation":
        raise EvaluationError(f"{path}: expected <annotation> as in VOC, found <{root.tag}>")
    return root


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    """(H, W) that the file says, if it does."""
    said = tuple((root.findtext(f"size/{side}") or "").strip() for side in ("height", "width"))
    height, width = (int(side) if side.isdecimal() else 0 for side in said)
    return (height, width) if height and width else None


def _is_hard(one: ElementTree.Element) -> bool:
    return any((one.findtext(mark) or "").strip() == "1" for mark in _HARD)


def _box(one: ElementTree.Element) -> Box:
    x0, y0, x1, y1 = (_number(one, side) for side in ("xmin", "ymin", "xmax", "ymax"))
    return x0 - 1, y0 - 1, x1, y1


def _number(one: ElementTree.Element, side: str) -> float:
    text = one.findtext(f"bndbox/{side}")
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise EvaluationError(f"expected a number as {side} of an object's bndbox, found {text!r}")
    return number
