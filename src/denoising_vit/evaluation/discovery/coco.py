"""Annotated objects in COCO's JSON files: one file for all photos."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from denoising_vit.data import Skipped
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import Box
from denoising_vit.evaluation.discovery.annotations import fitting_boxes
from denoising_vit.evaluation.layouts import read_lines, read_text

_EXPECTED = "expected COCO's objects: JSON with lists `images` (id, file_name) and `annotations` (image_id, bbox)"

#: Number of missing photos that are skipped one by one, rather than in one entry.
_LISTED = 20


@dataclass(frozen=True)
class CocoObjects:
    """The objects of a photo in a COCO JSON file.

    Attributes:
        name: path of the photo below the folder of photos.
        source: the JSON file.
        entries: its entries for the photo's objects, without crowds.
        size: (H, W) of the photo in the file, if it has it.
    """

    name: str
    source: Path
    entries: tuple[dict[str, Any], ...]
    size: tuple[int, int] | None

    def objects(self, height: int, width: int) -> dict[int, Box]:
        """Boxes by their position among the photo's entries."""
        if not self.entries:
            raise EvaluationError(f"{self.source}: no object of this photo, crowds (iscrowd) aside")
        return fitting_boxes(self.source, self.size, height, width, map(_coco_box, self.entries))


def _read(path: Path) -> tuple[dict[str, CocoObjects], list[Skipped]]:
    """Read a COCO JSON file: photos by id, and entries that cannot be used."""
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file; {_EXPECTED}")
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
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
            skipped.append(Skipped(name, f"{path}: a second entry of its name or its id {key}"))
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

    Args:
        source: the JSON file.
        folders: folders to look in; the first with one of the photos is taken.
        names: list of names or ids of the photos to take, one a line; None takes all.

    Raises:
        EvaluationError: if a file cannot be read or has another content, or no folder has any of the photos.
    """
    photos, skipped = _read(source)
    if names is not None:
        photos, unknown = _named(photos, names, source)
        skipped += unknown
    ordered = sorted(photos.values(), key=lambda photo: photo.name)
    folder = _folder_of(ordered, folders, source)
    there = [(folder / photo.name).is_file() for photo in ordered]
    missing = [photo.name for photo, exists in zip(ordered, there, strict=True) if not exists]
    skipped += _missing(missing, folder, source)
    return [photo for photo, exists in zip(ordered, there, strict=True) if exists], folder, skipped


def _named(photos: dict[str, CocoObjects], names: Path, source: Path) -> tuple[dict[str, CocoObjects], list[Skipped]]:
    """Photos of a list of ids, or of names with or without folders and endings."""
    by_stem = {PurePosixPath(photo.name).stem: key for key, photo in photos.items()}
    chosen: dict[str, CocoObjects] = {}
    skipped: list[Skipped] = []
    lines = read_lines(names)
    for line in lines:
        key = line if line in photos else by_stem.get(PurePosixPath(line).stem)
        if key is None:
            skipped.append(Skipped(line, f"named in {names}, but not in {source}"))
        elif key in chosen:
            skipped.append(Skipped(line, f"named a second time in {names}"))
        else:
            chosen[key] = photos[key]
    if not chosen:
        example = next(iter(photos.values())).name
        raise EvaluationError(
            f"{names}: expected names or ids of photos of {source}, one a line (such as {example}), found "
            f"{repr(lines[0]) if lines else 'no line'}"
        )
    return chosen, skipped


def _folder_of(photos: Sequence[CocoObjects], folders: Sequence[Path], source: Path) -> Path:
    """The first folder that has one of the photos."""
    for folder in folders:
        if any((folder / photo.name).is_file() for photo in photos):
            return folder
    holds = "; ".join(f"{folder} holds {_example(folder)}" for folder in folders) or "there is no folder of photos"
    raise EvaluationError(
        f"none of the {len(photos)} photos that {source} lists, such as {photos[0].name}, was found; "
        f"{holds}. Expected a folder with its photos, such as train2014 or images"
    )


def _example(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return f"{names[0]} ({len(names)} in all)" if names else "nothing"


def _missing(names: list[str], folder: Path, source: Path) -> list[Skipped]:
    if len(names) <= _LISTED:
        return [Skipped(name, f"named in {source}, but not in {folder}") for name in names]
    # One entry: the skipped photos are part of every line of results.
    return [Skipped(source.name, f"{len(names)} photos that it names are not in {folder}, {names[0]} for one")]
