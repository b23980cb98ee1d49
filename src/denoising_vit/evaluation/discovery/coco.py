"""Objects in the JSON files of COCO: one file for all photos."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from denoising_vit.data import Skipped
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.discovery.boxes import Box, within
from denoising_vit.evaluation.discovery.inspecting import Candidate, check_size
from denoising_vit.evaluation.layouts import read_text

#: How many missing photos are told one by one.
_TOLD = 20

_EXPECTED = "expected COCO's objects: JSON with lists `images` (id, file_name) and `annotations` (image_id, bbox)"


@dataclass(frozen=True)
class CocoTruth:
    """The objects of one photo.

    Attributes:
        source: the JSON file.
        entries: what it says of each object that is no crowd.
        size: (H, W) that it says of the photo, if it does.
    """

    source: Path
    entries: tuple[dict[str, Any], ...]
    size: tuple[int, int] | None

    def objects(self, height: int, width: int) -> dict[int, Box]:
        """Boxes by their place among the photo's objects.

        Raises:
            EvaluationError: if there are none, or one is not within a photo of H x W pixels.
        """
        check_size(self.source, self.size, height, width)
        if not self.entries:
            raise EvaluationError(f"{self.source}: no object of this photo, crowds (iscrowd) aside")
        try:
            return {number: within(_box(entry), height, width) for number, entry in enumerate(self.entries)}
        except EvaluationError as error:
            raise EvaluationError(f"{self.source}: {error}") from error


class _Photo(NamedTuple):
    name: str
    truth: CocoTruth


def coco_candidates(
    annotations: Path, folders: list[Path], names: Path | None
) -> tuple[list[Candidate], list[Skipped]]:
    """Photos of a JSON file that are in a folder, sorted by name.

    Args:
        annotations: the JSON file.
        folders: where the photos may be; the first that has one of them is taken.
        names: a list of names or ids of photos, one a line, where not all are wanted.

    Raises:
        EvaluationError: if a file cannot be read or is something else, or no folder has any of the photos.
    """
    photos, skipped = _read(annotations)
    if names is not None:
        photos, unknown = _named(photos, names, annotations)
        skipped += unknown
    ordered = sorted(photos.values(), key=lambda photo: photo.name)
    folder = _folder_of(ordered, folders, annotations)
    there = [photo for photo in ordered if (folder / photo.name).is_file()]
    known = {photo.name for photo in there}
    skipped += _missing([photo.name for photo in ordered if photo.name not in known], folder, annotations)
    return [Candidate(photo.name, folder / photo.name, photo.truth, photo.name) for photo in there], skipped


def _read(path: Path) -> tuple[dict[str, _Photo], list[Skipped]]:
    """Photos by their ids as text."""
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file; {_EXPECTED}")
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path}: damaged JSON ({error}); {_EXPECTED}") from error
    images, annotations = (_list_of(content, key, path) for key in ("images", "annotations"))
    entries: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in annotations:
        if not entry.get("iscrowd"):
            entries[str(entry.get("image_id"))].append(entry)
    photos: dict[str, _Photo] = {}
    skipped: list[Skipped] = []
    names: set[str] = set()
    for number, image in enumerate(images):
        name, key = image.get("file_name"), str(image.get("id"))
        if not isinstance(name, str) or "id" not in image or not _is_below(name):
            skipped.append(Skipped(f"images[{number}]", f"{path}: {_described(name)}, and an id"))
        elif name in names or key in photos:
            skipped.append(Skipped(name, f"{path}: a second entry of its name or its id {key}"))
        else:
            photos[key] = _Photo(name, CocoTruth(path, tuple(entries[key]), _size(image)))
            names.add(name)
    if not photos:
        raise EvaluationError(f"{path}: {len(images)} images, none of which has a name and an id; {_EXPECTED}")
    return photos, skipped


def _list_of(content: Any, key: str, path: Path) -> list[dict[str, Any]]:
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        what = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise EvaluationError(f"{path}: no list of {key}, found {what or 'nothing'}; {_EXPECTED}")
    return found


def _is_below(name: str) -> bool:
    """Whether a path stays below the folder that it is taken from."""
    path = PurePosixPath(name.replace("\\", "/"))
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]


def _described(name: object) -> str:
    return f"expected a path below the folder of photos as file_name, found {name!r}"


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    height, width = image.get("height"), image.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _named(photos: dict[str, _Photo], names: Path, annotations: Path) -> tuple[dict[str, _Photo], list[Skipped]]:
    """Photos of a list; lines are ids, or names with or without folders and endings."""
    known = {PurePosixPath(photo.name).stem: key for key, photo in photos.items()}
    chosen: dict[str, _Photo] = {}
    skipped: list[Skipped] = []
    lines = [line for line in map(str.strip, read_text(names).split("\n")) if line]
    for line in lines:
        key = line if line in photos else known.get(PurePosixPath(line).stem)
        if key is None:
            skipped.append(Skipped(line, f"named in {names}, but not in {annotations}"))
        elif key in chosen:
            skipped.append(Skipped(line, f"named a second time in {names}"))
        else:
            chosen[key] = photos[key]
    if not chosen:
        example = f"{lines[0]!r}" if lines else "no line"
        raise EvaluationError(
            f"{names}: expected names or ids of photos of {annotations}, one a line (such as "
            f"{next(iter(photos.values())).name}), found {example}"
        )
    return chosen, skipped


def _folder_of(photos: list[_Photo], folders: list[Path], annotations: Path) -> Path:
    for folder in folders:
        if any((folder / photo.name).is_file() for photo in photos):
            return folder
    holds = "; ".join(f"{folder} holds {_example(folder)}" for folder in folders) or "there is no folder of photos"
    raise EvaluationError(
        f"{annotations} is of other photos: it names {photos[0].name} ({len(photos)} in all), none of which is there; "
        f"{holds}. Expected the folder of its photos beside its own, such as train2014 or images"
    )


def _example(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return f"{names[0]} ({len(names)} in all)" if names else "nothing"


def _missing(names: list[str], folder: Path, annotations: Path) -> list[Skipped]:
    if len(names) <= _TOLD:
        return [Skipped(name, f"named in {annotations}, but not in {folder}") for name in names]
    # One by one they would make every line of results larger than all the rest of it.
    return [Skipped(annotations.name, f"{len(names)} photos that it names are not in {folder}, {names[0]} for one")]


def _box(entry: dict[str, Any]) -> Box:
    box = entry.get("bbox")
    try:
        x, y, width, height = map(float, box)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError) as error:
        raise EvaluationError(f"expected x, y, width and height as bbox of an object, found {str(box)[:60]}") from error
    return x, y, x + width, y + height
