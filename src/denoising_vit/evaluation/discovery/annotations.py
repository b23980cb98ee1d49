"""Boxes of the annotated objects of photos: masks, VOC XML files, or a COCO JSON file of all photos."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from xml.etree import ElementTree

import numpy as np

from denoising_vit.data import Skipped
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import Box
from denoising_vit.evaluation.layouts import check_same_size, read_lines, read_text
from denoising_vit.evaluation.masks import MAX_OBJECTS, WHITE, read_values
from denoising_vit.files import parse_json

#: Maximum size of an XML file in bytes; typical VOC files have a few thousand.
_MAX_XML_BYTES = 10_000_000

#: Pixels by which a box may exceed the image, because of rounding.
_SLACK = 1.0

#: x0, y0, x1, y1 in elements of a mask, pixels or patches; half-open.
CellBox = tuple[int, int, int, int]


class Annotation(Protocol):
    """The annotated objects of a photo."""

    def objects(self, height: int, width: int) -> dict[int, Box]:
        """Boxes of all objects by number, at least one, for a photo of H x W pixels.

        Raises:
            EvaluationError: if there are no objects, or they do not fit the photo.
        """
        ...


def box_around(mask: np.ndarray) -> CellBox:
    """The smallest box around the true elements of a mask (h, w), of which there must be at least one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def within(box: Box, height: int, width: int) -> Box:
    """Clip an annotated box to the image, if it exceeds the image by at most one pixel.

    Raises:
        EvaluationError: if it exceeds it by more, has no area, or is not finite.
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
    """Numbered boxes of a file, checked against a photo of H x W pixels; ``size`` is the file's (H, W), if known."""
    if size is not None and size != (height, width):
        raise EvaluationError(
            f"{source}: boxes are for an image of {size[1]} x {size[0]}, expected the photo's {width} x {height} "
            "(EXIF orientation applied); is this another photo, or was it resized?"
        )
    try:
        return {number: within(box, height, width) for number, box in enumerate(boxes)}
    except EvaluationError as error:
        raise EvaluationError(f"{source}: {error}") from error


@dataclass(frozen=True)
class MaskObjects:
    """The objects of a mask that has the photo's size.

    Object numbers are the mask's values: 1 to 50, or 255 if there are no other values than 0.
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
                f"{self.path}: {len(there)} different values, {len(wrong)} of them neither 0, {WHITE} nor object "
                f"numbers ({shown}); expected 0 and {WHITE}, or 0 and 1 to {MAX_OBJECTS} with {WHITE} for no object. "
                "Was the mask blurred, or saved as JPEG?"
            )
        check_same_size((height, width), values.shape, self.path)
        numbers = [number for number in there.tolist() if number]
        numbers = [number for number in numbers if number != WHITE] or numbers
        if not numbers:
            raise EvaluationError(f"{self.path}: no object: all {values.size:,} pixels are 0")
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
        """Boxes by their position in the file; the file counts pixels from 1 and includes the last pixel."""
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
        texts = [_text(root, f"size/{side}") for side in ("height", "width")]
        rows, columns = (int(text) if text.isdecimal() else 0 for text in texts)
        size = (rows, columns) if rows and columns else None
        return fitting_boxes(self.path, size, height, width, map(_xml_box, chosen))


def _parsed_xml(path: Path) -> ElementTree.Element:
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file, expected the photo's objects as XML")
    if path.stat().st_size > _MAX_XML_BYTES:
        raise EvaluationError(f"{path}: larger than {_MAX_XML_BYTES:,} bytes, expected the objects of one photo as XML")
    text = read_text(path)
    # A document type can declare entities that read other files or expand without end.
    if "<!DOCTYPE" in text:
        raise EvaluationError(f"{path}: expected XML without a document type (<!DOCTYPE ...>); remove it")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise EvaluationError(f"{path}: damaged XML, expected the photo's objects ({error})") from error
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


# --- COCO: one JSON file for all photos ---

_EXPECTED = "expected COCO's objects: JSON with lists `images` (id, file_name) and `annotations` (image_id, bbox)"

#: Maximum number of missing photos that get one skipped entry each; if there are more, they share one entry.
_LISTED = 20


@dataclass(frozen=True)
class CocoObjects:
    """The objects of a photo in a COCO JSON file.

    Attributes:
        name: path of the photo below the folder of photos.
        source: the JSON file.
        entries: the file's entries for the photo's objects, without crowds.
        size: (H, W) of the photo according to the file, if given.
    """

    name: str
    source: Path
    entries: tuple[dict[str, Any], ...]
    size: tuple[int, int] | None

    def objects(self, height: int, width: int) -> dict[int, Box]:
        """Boxes by their position among the photo's entries."""
        if not self.entries:
            raise EvaluationError(f"{self.source}: no object for this photo, apart from crowds (iscrowd)")
        return fitting_boxes(self.source, self.size, height, width, map(_coco_box, self.entries))


def _read(path: Path) -> tuple[dict[str, CocoObjects], list[Skipped]]:
    """Read a COCO JSON file: photos by id, and unusable entries."""
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file; {_EXPECTED}")
    try:
        content = parse_json(read_text(path))
    except ValueError as error:
        raise EvaluationError(f"{path}: damaged JSON ({error}); {_EXPECTED}") from error
    images, annotations = (_entries(content, key, path) for key in ("images", "annotations"))
    entries: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in annotations:
        if not entry.get("iscrowd"):
            entries[str(entry.get("image_id"))].append(entry)
    photos: dict[str, CocoObjects] = {}
    skipped: list[Skipped] = []
    names: set[str] = set()
    for number, image in enumerate(images):
        name, key = image.get("file_name"), str(image.get("id"))
        if not isinstance(name, str) or "id" not in image or not _is_below(name):
            reason = f"expected a path below the folder of photos as file_name, and an id; found {name!r}"
            skipped.append(Skipped(f"images[{number}]", f"{path}: {reason}"))
        elif name in names or key in photos:
            skipped.append(Skipped(name, f"{path}: duplicate name or id {key}"))
        else:
            height, width = image.get("height"), image.get("width")
            size = (height, width) if isinstance(height, int) and isinstance(width, int) else None
            photos[key] = CocoObjects(name, path, tuple(entries[key]), size)
            names.add(name)
    if not photos:
        raise EvaluationError(f"{path}: {len(images)} images, none of which has a name and an id; {_EXPECTED}")
    return photos, skipped


def _entries(content: Any, key: str, path: Path) -> list[dict[str, Any]]:
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        what = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise EvaluationError(f"{path}: no list of {key}, found {what or 'nothing'}; {_EXPECTED}")
    return found


def _is_below(name: str) -> bool:
    """True if a path stays below the folder it is relative to."""
    path = PurePosixPath(name.replace("\\", "/"))
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]


def _coco_box(entry: dict[str, Any]) -> Box:
    box = entry.get("bbox")
    try:
        x, y, width, height = map(float, box)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError) as error:
        raise EvaluationError(f"expected x, y, width and height as bbox of an object, found {str(box)[:60]}") from error
    return x, y, x + width, y + height


def coco_photos(
    source: Path, folders: Sequence[Path], names: Path | None
) -> tuple[list[CocoObjects], Path, list[Skipped]]:
    """Photos of a JSON file, sorted by name, and their folder.

    The first folder that has one of the photos is used. ``names`` is a list file with names or ids of the photos to
    use, one per line.
    """
    photos, skipped = _read(source)
    if names is not None:
        photos, unknown = _named(photos, names, source)
        skipped += unknown
    ordered = sorted(photos.values(), key=lambda photo: photo.name)
    folder = _folder_of(ordered, folders, source)
    there = [photo for photo in ordered if (folder / photo.name).is_file()]
    missing = {photo.name for photo in ordered} - {photo.name for photo in there}
    return there, folder, skipped + _missing(sorted(missing), folder, source)


def _named(photos: dict[str, CocoObjects], names: Path, source: Path) -> tuple[dict[str, CocoObjects], list[Skipped]]:
    """Photos listed by id or by name, with or without folders and extensions."""
    by_stem = {PurePosixPath(photo.name).stem: key for key, photo in photos.items()}
    chosen: dict[str, CocoObjects] = {}
    skipped: list[Skipped] = []
    lines = read_lines(names)
    for line in lines:
        key = line if line in photos else by_stem.get(PurePosixPath(line).stem)
        if key is None:
            skipped.append(Skipped(line, f"listed in {names}, but not in {source}"))
        elif key in chosen:
            skipped.append(Skipped(line, f"listed twice in {names}"))
        else:
            chosen[key] = photos[key]
    if not chosen:
        example = next(iter(photos.values())).name
        raise EvaluationError(
            f"{names}: expected names or ids of photos of {source}, one per line (such as {example}), found "
            f"{repr(lines[0]) if lines else 'no line'}"
        )
    return chosen, skipped


def _folder_of(photos: Sequence[CocoObjects], folders: Sequence[Path], source: Path) -> Path:
    """The first folder that has one of the photos."""
    for folder in folders:
        if any((folder / photo.name).is_file() for photo in photos):
            return folder
    holds = "; ".join(f"{folder} has {_example(folder)}" for folder in folders) or "there is no folder of photos"
    raise EvaluationError(
        f"none of the {len(photos)} photos listed in {source}, such as {photos[0].name}, was found; "
        f"{holds}. Expected a folder with these photos, such as train2014 or images"
    )


def _example(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return f"{names[0]} ({len(names)} in total)" if names else "nothing"


def _missing(names: list[str], folder: Path, source: Path) -> list[Skipped]:
    if len(names) <= _LISTED:
        return [Skipped(name, f"listed in {source}, but not in {folder}") for name in names]
    # Only one entry, because every line of results contains the skipped photos.
    return [Skipped(source.name, f"{len(names)} listed photos are not in {folder}, such as {names[0]}")]
