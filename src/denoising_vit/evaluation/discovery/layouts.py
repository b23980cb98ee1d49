"""Data sets of photos with object boxes: VOC, COCO, DAVIS, or folders of photos and masks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from denoising_vit.data import Skipped
from denoising_vit.data.photos import read_photo
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import Box, EvaluationData, EvaluationImage, EvaluationSet, described
from denoising_vit.evaluation.discovery.annotations import Annotation, MaskObjects, VocObjects, coco_photos
from denoising_vit.evaluation.layouts import (
    Layout,
    Unread,
    at_most,
    find_layout,
    inspect_all,
    listed,
    pairs_in_folders,
    read_names,
    read_sequences,
    readable,
    require_usable,
)
from denoising_vit.evaluation.masks import WHITE

#: The layout that has sequences of photos.
DAVIS = "davis"

#: Number of JSON files that a message lists.
_SHOWN = 8


@dataclass(frozen=True)
class BoxedImage(EvaluationImage):
    """A photo with object boxes.

    Attributes:
        boxes: x0, y0, x1, y1 in pixels, half-open, within the image; sorted, at least one.
        sequence: name of the photo's sequence; the photo's id if it is in no sequence.
    """

    boxes: tuple[Box, ...]
    sequence: str

    @property
    def truth_digest(self) -> str:
        """Digest of the boxes."""
        return hashlib.sha256(np.array(self.boxes, dtype="<f8").tobytes()).hexdigest()


@dataclass(frozen=True)
class BoxedData(EvaluationData[EvaluationSet[BoxedImage]]):
    """Photos with object boxes, in one split."""


@dataclass(frozen=True)
class _Candidate(Unread):
    """A photo and its annotated objects."""

    truth: Annotation
    sequence: str


@dataclass(frozen=True)
class _Options:
    """Options that only some layouts have."""

    split: str | None = None
    difficult: bool = True
    annotations: Path | None = None
    names: Path | None = None

    def check(self, title: str, *allowed: str) -> None:
        """Raise EvaluationError for options that do not apply to a layout."""
        for name, default in vars(_Options()).items():
            if name not in allowed and getattr(self, name) != default:
                raise EvaluationError(f"{name} does not apply to {title}, got {getattr(self, name)}; omit it")


@dataclass(frozen=True)
class _Found:
    """The files of a data set, not yet read."""

    name: str
    candidates: list[_Candidate]
    skipped: list[Skipped] = field(default_factory=list)
    note: str | None = None


def open_boxed(
    path: str | Path,
    *,
    images: int = 0,
    split: str | None = None,
    difficult: bool = True,
    annotations: Path | None = None,
    names: Path | None = None,
    progress: Callable[[], None] | None = None,
) -> BoxedData:
    """Open a data set of photos with object boxes, reading every photo and annotation once.

    Layouts: VOC 2007 or 2012 (JPEGImages, Annotations, ImageSets/Main); COCO (a JSON file in annotations, photos in a
    sibling folder); DAVIS (a folder per sequence in JPEGImages/480p and Annotations/480p); photos and masks with the
    same names in ``images`` and ``masks``. In masks, each number from 1 to 50 is an object and 255 is not; if all
    masks have only 0 and 255, 255 is the object.

    Args:
        path: the folder.
        images: maximum number of images, spread evenly; 0 uses all.
        split: VOC: list in ImageSets/Main, by default trainval. COCO: part of the JSON file's name after instances_, if
            there are several. DAVIS: list of sequences in ImageSets, such as 2016/val.
        difficult: VOC: include objects marked as difficult or truncated, as LOST's evaluation does except in its
            setting ``no_hard``.
        annotations: COCO: the JSON file, if there are several in annotations.
        names: COCO: list of names or ids of photos, one per line, as for COCO20k.
        progress: called after each image.

    Raises:
        EvaluationError: if the layout is unknown or ambiguous, or no photo is usable.
    """
    path = Path(path)
    options = _Options(split, difficult, annotations, names)
    with readable(path):
        try:
            layout, root = find_layout(path, _LAYOUTS)
        except EvaluationError:
            if annotations is None or not path.is_dir():
                raise
            layout, root = _COCO, path
        found = layout.open(root, options)
    candidates = at_most(found.candidates, images)
    inspected, failed = _without_void(*inspect_all(_inspected, candidates, progress))
    skipped = (*found.skipped, *failed)
    require_usable(inspected, f"photos with boxes ({found.name})", len(candidates), skipped, path)
    val = EvaluationSet("val", tuple(image for image, _ in inspected), skipped=skipped)
    return BoxedData(found.name, layout.name, (val,), found.note)


#: A usable photo, and the numbers of its objects.
_Inspected = tuple[BoxedImage, frozenset[int]]


def _inspected(candidate: _Candidate) -> _Inspected:
    photo = read_photo(candidate.photo)
    objects = candidate.truth.objects(*photo.shape[:2])
    image = BoxedImage(
        **described("val", candidate.id, candidate.photo, photo),
        boxes=tuple(sorted(objects.values())),  # so that the digest is independent of the order in the file
        sequence=candidate.sequence,
    )
    return image, frozenset(objects)


def _without_void(inspected: list[_Inspected], failed: list[Skipped]) -> tuple[list[_Inspected], list[Skipped]]:
    """Skip masks that have only 0 and 255 if other masks have object numbers: 255 then means no object."""
    white = frozenset({WHITE})
    if all(numbers == white for _, numbers in inspected):
        return inspected, failed
    reason = f"no object: the mask has only 0 and {WHITE}, which means no object because other masks have numbers"
    void = [Skipped(image.id, reason) for image, numbers in inspected if numbers == white]
    return [one for one in inspected if one[1] != white], [*failed, *void]


def _open_voc(root: Path, options: _Options) -> _Found:
    options.check("VOC", "split", "difficult")
    split, lists = options.split or "trainval", root / "ImageSets" / "Main"
    if not (lists / f"{split}.txt").is_file():
        raise EvaluationError(
            f"{lists / split}.txt: expected a list of names, one per line, found no such file; {listed(lists)}"
        )
    names, repeated = read_names(lists / f"{split}.txt")

    def candidate(name: str) -> _Candidate:
        photo = f"{name}.jpg"
        truth = VocObjects(root / "Annotations" / f"{name}.xml", options.difficult)
        return _Candidate(photo, root / "JPEGImages" / photo, truth, photo)

    year = root.resolve().name.removeprefix("VOC")
    title = f"VOC {year} {split}" if year.isdigit() else f"VOC {split}"
    note = None if options.difficult else "objects marked as difficult or truncated are left out"
    return _Found(title, [candidate(name) for name in names], repeated, note)


def _open_coco(root: Path, options: _Options) -> _Found:
    options.check("COCO", "split", "annotations", "names")
    source = options.annotations or _json_file(root / "annotations", options.split)
    split = source.stem.removeprefix("instances_")
    likely = (root / split, root / "images" / split, root / "images")
    others = (entry for entry in sorted(root.iterdir()) if entry.name != "annotations" and entry.name[0] != ".")
    folders = list(dict.fromkeys(folder for folder in (*likely, *others, root) if folder.is_dir()))
    photos, folder, skipped = coco_photos(source, folders, options.names)
    candidates = [_Candidate(photo.name, folder / photo.name, photo, photo.name) for photo in photos]
    note = f"only photos listed in {options.names.name}" if options.names else None
    return _Found(f"COCO {split}", candidates, skipped, note)


def _json_file(folder: Path, split: str | None) -> Path:
    """The JSON file with boxes."""
    if split is not None:
        path = folder / f"instances_{split}.json"
        return path if path.is_file() else folder / f"{split}.json"
    found = sorted(folder.glob("instances_*.json")) or sorted(folder.glob("*.json"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:_SHOWN])
        raise EvaluationError(
            f"{folder} has {len(found)} JSON files ({names}); choose one with the option annotations or split"
        )
    return found[0]


def _open_davis(root: Path, options: _Options) -> _Found:
    options.check("DAVIS", "split")
    candidates, skipped = _masked(root / "JPEGImages" / "480p", root / "Annotations" / "480p", in_sequences=True)
    if options.split is None:
        return _Found("DAVIS", candidates, skipped, _AROUND)
    lists = root / "ImageSets"
    paths = [lists / f"{options.split}.txt", *sorted(lists.glob(f"*/{options.split}.txt"))]
    found = [path for path in paths if path.is_file()]
    if len(found) != 1:
        what = " and ".join(map(str, found)) or "none"
        raise EvaluationError(f"{lists}: expected one list {options.split}.txt, here or in a subfolder, found {what}")
    wanted = read_sequences(found[0])
    candidates = [one for one in candidates if one.sequence in wanted]
    there = {one.sequence for one in candidates}
    skipped = [one for one in skipped if PurePosixPath(one.item).parts[0] in wanted]
    skipped += [Skipped(name, "a listed sequence without any mask") for name in wanted if name not in there]
    return _Found(f"DAVIS {options.split}", candidates, sorted(skipped, key=lambda one: one.item), _AROUND)


def _open_folders(root: Path, options: _Options) -> _Found:
    options.check("photos and masks in folders")
    return _Found(root.resolve().name, *_masked(root / "images", root / "masks", in_sequences=False), note=_AROUND)


def _masked(photos: Path, masks: Path, *, in_sequences: bool) -> tuple[list[_Candidate], list[Skipped]]:
    pairs, skipped = pairs_in_folders(photos, masks)
    sequences = [PurePosixPath(pair.id).parts[0] if in_sequences else pair.id for pair in pairs]
    found = zip(pairs, sequences, strict=True)
    return [_Candidate(pair.id, pair.photo, MaskObjects(pair.mask), sequence) for pair, sequence in found], skipped


_AROUND = "boxes enclose the objects of masks"

_COCO = Layout("COCO", ("annotations/*.json",), _open_coco, name="coco")

#: The first match is used.
_LAYOUTS = (
    Layout("DAVIS", ("JPEGImages/480p", "Annotations/480p"), _open_davis, roots=(".", "DAVIS"), name=DAVIS),
    Layout(
        "VOC",
        ("JPEGImages", "Annotations", "ImageSets/Main"),
        _open_voc,
        roots=(".", "VOC2007", "VOC2012", "VOCdevkit/VOC2007", "VOCdevkit/VOC2012"),
        name="voc",
    ),
    _COCO,
    Layout("folders of photos and masks", ("images", "masks"), _open_folders, name="masks"),
)
