"""Photos with class masks: VOC 2012, ADE20K, or folders of photos and masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from denoising_vit.data import Skipped, spread
from denoising_vit.data.photos import photo_digest, read_photo
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import JudgedImage, JudgedSet, shared_photos
from denoising_vit.evaluation.layouts import (
    Pair,
    check_count,
    inspect_all,
    listed,
    pairs_in_folders,
    pairs_in_list,
    read_text,
)
from denoising_vit.evaluation.masks import Coding, read_mask

#: The classes of Pascal VOC in the order of their labels.
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


#: How many classes ADE20K's scene parsing benchmark has.
ADE_CLASSES = 150


_REMEDY = "Write the names of the classes into it, one a line, that of label 0 first"


def read_class_list(path: Path) -> tuple[str, ...]:
    """Names of classes, one a line; the first line names label 0.

    Raises:
        EvaluationError: if the file is missing, has no name, an empty line among names, or a name twice.
    """
    if not path.is_file():
        raise EvaluationError(f"{path}: expected a list of classes, found no such file. {_REMEDY}")
    names = [line.strip() for line in read_text(path).rstrip().split("\n")]
    if names == [""]:
        raise EvaluationError(f"{path}: expected a list of classes, found an empty file. {_REMEDY}")
    first: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name:
            # Leaving it out would give every later class the label of its neighbour.
            raise EvaluationError(f"{path}: line {number} is empty, expected the name of label {number - 1}")
        if first.setdefault(name, number) != number:
            raise EvaluationError(
                f"{path}: line {number} is {name!r}, as line {first[name]}; expected a name of its own for each class"
            )
    return tuple(names)


def read_ade_names(table: Path) -> tuple[str, ...]:
    """Names from ADE20K's ``objectInfo150.txt``, or ``class 1`` to ``class 150`` where that is missing.

    Raises:
        EvaluationError: if the table is there and does not number 150 classes.
    """
    if not table.is_file():
        return tuple(f"class {number}" for number in range(1, ADE_CLASSES + 1))
    rows = [line.strip().split("\t") for line in read_text(table).split("\n") if line.strip()][1:]
    if [row[0].strip() for row in rows] != [str(number) for number in range(1, ADE_CLASSES + 1)]:
        raise EvaluationError(
            f"{table}: expected a header and then classes 1 to {ADE_CLASSES} in tab-separated columns, number first "
            f"and name last, found {len(rows)} rows that are not these; fetch the file again, or remove it"
        )
    return tuple(row[-1].strip() for row in rows)


@dataclass(frozen=True)
class LabelledImage(JudgedImage):
    """A photo with a class for each pixel, inspected once and read again when it is needed.

    Attributes:
        mask: the file of the mask, which has the photo's size.
        coding: what the mask's numbers mean.
        mask_digest: of the labels.
        class_pixels: labelled pixels of each class, K of them.
    """

    mask: Path
    coding: Coding
    mask_digest: str
    class_pixels: tuple[int, ...]

    @property
    def classes(self) -> int:
        """How many classes there are, K."""
        return self.coding.classes

    @property
    def shift(self) -> int:
        """The number that the mask has for class 0."""
        return self.coding.shift

    @property
    def truth_digest(self) -> str:
        """Of the labels."""
        return self.mask_digest

    def labels(self) -> Tensor:
        """Classes (H, W) int64 in 0 to K - 1, NO_LABEL where there is none.

        Raises:
            EvaluationError: if the mask can no longer be read.
        """
        return torch.from_numpy(read_mask(self.mask, self.coding))


@dataclass(frozen=True)
class LabelledSet(JudgedSet[LabelledImage]):
    """One split, in a fixed order.

    Attributes:
        class_names: of classes 0 to K - 1.
    """

    class_names: tuple[str, ...]

    @cached_property
    def pixels(self) -> tuple[int, ...]:
        """Labelled pixels of each class, K of them."""
        counts = np.zeros(len(self.class_names), dtype=np.int64)
        for image in self.images:
            counts += image.class_pixels
        return tuple(counts.tolist())

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes that have no pixel here."""
        return tuple(name for name, count in zip(self.class_names, self.pixels, strict=True) if count == 0)

    def subset(self, count: int) -> LabelledSet:
        """At most so many images, evenly spread over all of them; 0 takes all.

        Raises:
            EvaluationError: if the count is negative.
        """
        check_count(count)
        return replace(self, images=tuple(self.images[index] for index in spread(len(self.images), count)))


def inspect(
    split: str,
    pairs: Sequence[Pair],
    coding: Coding,
    class_names: tuple[str, ...],
    *,
    skipped: Sequence[Skipped] = (),
    progress: Callable[[], None] | None = None,
) -> LabelledSet:
    """Reads every photo and mask once, so that what cannot be used is known before the work begins.

    Args:
        split: ``train`` or ``val``.
        pairs: in the order that the set shall have.
        coding: what the masks' numbers mean.
        class_names: of classes 0 to K - 1.
        skipped: what was found to be unusable before.
        progress: called after each pair.

    Raises:
        EvaluationError: if nothing usable remains.
    """
    images, unusable = inspect_all(lambda pair: _inspect_one(split, pair, coding), pairs, progress)
    failed = [*skipped, *unusable]
    if not images:
        first = f"; the first reason: {failed[0].item}: {failed[0].reason}" if failed else ""
        raise EvaluationError(
            f"expected photos with masks for the split {split}, none of {len(pairs)} pairs can be used{first}"
        )
    return LabelledSet(split, tuple(images), class_names, skipped=tuple(failed))


def _inspect_one(split: str, pair: Pair, coding: Coding) -> LabelledImage | Skipped:
    photo = read_photo(pair.photo)
    labels = read_mask(pair.mask, coding)
    height, width = labels.shape
    if photo.shape[:2] != labels.shape:
        return Skipped(
            pair.id,
            f"expected photo and mask of the same size, got a photo of {photo.shape[1]} x {photo.shape[0]} pixels and "
            f"a mask of {width} x {height} ({pair.mask})",
        )
    counts = np.bincount(labels[labels >= 0], minlength=coding.classes)
    return LabelledImage(
        split=split,
        id=pair.id,
        photo=pair.photo,
        mask=pair.mask,
        coding=coding,
        height=height,
        width=width,
        digest=photo_digest(photo),
        mask_digest=photo_digest(labels.astype("<i4")),  # the same on every machine
        class_pixels=tuple(counts.tolist()),
    )


Layout = Literal["voc2012", "ade20k", "folders"]


@dataclass(frozen=True)
class LabelledData:
    """A labelled data set with its two splits.

    Attributes:
        name: for tables.
        layout: how it lies on the disk.
        train: what probes are trained on.
        val: what they are judged on.
        note: what a reader of the results should know, if anything.
        score: names of the classes that scores are of; none for all. The others can still be predicted.
    """

    name: str
    layout: Layout
    train: LabelledSet
    val: LabelledSet
    note: str | None
    score: tuple[str, ...] = ()

    @property
    def splits(self) -> tuple[LabelledSet, ...]:
        """Both."""
        return self.train, self.val

    @property
    def scored(self) -> tuple[str, ...]:
        """Names of the classes that scores are of, in the order of their labels."""
        return tuple(name for name in self.val.class_names if not self.score or name in self.score)

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes to score that no judged pixel has."""
        return tuple(name for name in self.val.absent if name in self.scored)

    def require_two_classes(self) -> None:
        """Refuses data of which any guess scores 100.

        Raises:
            EvaluationError: if the masks of ``val`` hold fewer than two classes.
        """
        there = [name for name in self.scored if name not in self.absent]
        if len(there) < 2:
            held, note = " and ".join(there) or "none", f". {self.note}" if self.note else ""
            raise EvaluationError(
                f"{self.name}: the masks of val hold {held} of {len(self.scored)} classes; expected at least "
                f"two, as there is nothing to tell apart otherwise{note}"
            )

    def scoring(self, score: Sequence[str]) -> LabelledData:
        """The same data with scores of these classes alone; none for all.

        Raises:
            EvaluationError: if a name is no class of the data, or there is but one.
        """
        names = self.val.class_names
        unknown = [name for name in score if name not in names]
        if unknown or len(set(score)) != len(score) or len(score) == 1:
            raise EvaluationError(
                f"score must be two or more different classes of {self.name}, got {', '.join(score)}; "
                f"its classes: {', '.join(names)}"
            )
        return replace(self, score=tuple(name for name in names if name in score))


#: Share of pixels without a label that is told of where a class never occurs; borders of objects are about 0.05.
_COMMON = 0.1


class _Split(NamedTuple):
    pairs: list[Pair]
    skipped: list[Skipped]


class _Found(NamedTuple):
    """A data set whose files are known and not yet read."""

    name: str
    layout: Layout
    class_names: tuple[str, ...]
    coding: Coding
    train: _Split
    val: _Split
    note: str | None = None


class _Arrangement(NamedTuple):
    """What has to be where; ``roots`` are places below the given folder where that may begin."""

    title: str
    roots: tuple[str, ...]
    required: tuple[str, ...]
    find: Callable[[Path, Path | None], _Found]


def open_labelled(
    path: str | Path,
    *,
    classes: Path | None = None,
    images: int = 0,
    progress: Callable[[], None] | None = None,
) -> LabelledData:
    """Opens a labelled data set; every photo and mask that is taken is read once.

    Known layouts: VOC 2012 as it is unpacked; ADE20K (scene parsing, 150 classes) as it is unpacked; photos and masks
    of the same names in ``train/images``, ``train/masks``, ``val/images`` and ``val/masks`` (or ``images/train`` and so
    on); or in ``images`` and ``masks`` alone, where the first half by name becomes train; with ``classes.txt``, the
    names of the classes.

    Args:
        path: the folder.
        classes: names of the classes, one a line, instead of ``classes.txt``; not for VOC 2012 and ADE20K.
        images: at most so many of each split, spread evenly; 0 takes all.
        progress: called after each image.

    Raises:
        EvaluationError: if there is no such layout, no list of classes, or nothing usable in a split.
    """
    check_count(images)
    root = Path(path)
    try:
        found = _find(root, classes)
    except OSError as error:  # a folder that may not be looked into, a name too long for the file system
        raise EvaluationError(f"{root}: cannot be read ({error.strerror or error})") from error

    train = _opened(root, "train", found, found.train, images, progress)
    val = _opened(root, "val", found, found.val, images, progress)
    notes = [note for note in (found.note, shared_photos(train, val), _ignored_note(val, found.coding)) if note]
    return LabelledData(found.name, found.layout, train, val, "; ".join(notes) or None)


def _ignored_note(split: LabelledSet, coding: Coding) -> str | None:
    """What a reader should know where a class never occurs and much has no label: it may be written as that."""
    unlabelled = 1 - sum(split.pixels) / sum(image.height * image.width for image in split.images)
    if not split.absent or unlabelled < _COMMON:
        return None
    numbers = " and ".join(map(str, coding.ignored))
    return (
        f"{', '.join(split.absent)}: never in the masks of {split.split}, while {100 * unlabelled:.0f} % of their "
        f"pixels have {numbers}, which means no label; if a class is written so, give it its number in the list"
    )


def _opened(
    root: Path, split: str, found: _Found, files: _Split, images: int, progress: Callable[[], None] | None
) -> LabelledSet:
    pairs = [files.pairs[index] for index in spread(len(files.pairs), images)]
    try:
        return inspect(split, pairs, found.coding, found.class_names, skipped=files.skipped, progress=progress)
    except EvaluationError as error:
        raise EvaluationError(f"{root}: {error}") from error


def _find(path: Path, classes: Path | None) -> _Found:
    if not path.is_dir():
        what = "a file" if path.exists() else "nothing"
        raise EvaluationError(f"{path}: expected the folder of a labelled data set, found {what} there")
    partly = []
    for arrangement in _ARRANGEMENTS:
        for below in arrangement.roots:
            root = path / below
            missing = [name for name in arrangement.required if not (root / name).exists()]
            if not missing:
                return arrangement.find(root, classes)
            if len(missing) < len(arrangement.required):
                partly.append(f"{root} looks like {arrangement.title}, but lacks {', '.join(missing)}")
    raise EvaluationError(_unknown(path, partly))


def _unknown(path: Path, partly: list[str]) -> str:
    if partly:
        return f"{partly[0]}; expected {_EXPECTED}"  # the more particular layouts come first
    return f"{path}: expected {_EXPECTED}; found {listed(path)}"


def _find_voc(root: Path, classes: Path | None) -> _Found:
    _refuse(classes, "VOC 2012")

    def split(name: str) -> _Split:
        names = root / "ImageSets" / "Segmentation" / f"{name}.txt"
        return _Split(*pairs_in_list(names, root / "JPEGImages", root / "SegmentationClass"))

    # 255 is the border around objects; a label right after the last class never means one here.
    coding = Coding(len(VOC_CLASSES), "VOC 2012", ignored=(255,))
    year = root.name.removeprefix("VOC")  # other years lie on the disk in the same way
    name = f"VOC {year}" if root.name.startswith("VOC") and year.isdigit() else "VOC 2012"
    return _Found(name, "voc2012", VOC_CLASSES, coding, split("train"), split("val"))


def _find_ade(root: Path, classes: Path | None) -> _Found:
    _refuse(classes, "ADE20K")

    def split(name: str) -> _Split:
        return _Split(*pairs_in_folders(root / "images" / name, root / "annotations" / name))

    names = read_ade_names(root / "objectInfo150.txt")
    coding = Coding(ADE_CLASSES, "ADE20K", shift=1, ignored=(0, 255))
    return _Found("ADE20K", "ade20k", names, coding, split("training"), split("validation"))


def _find_splits(root: Path, classes: Path | None) -> _Found:
    names, coding = _listed_classes(root, classes)
    train, val = (_Split(*pairs_in_folders(root / name / "images", root / name / "masks")) for name in ("train", "val"))
    return _Found(root.resolve().name, "folders", names, coding, train, val)


def _find_splits_inside(root: Path, classes: Path | None) -> _Found:
    names, coding = _listed_classes(root, classes)
    train, val = (_Split(*pairs_in_folders(root / "images" / name, root / "masks" / name)) for name in ("train", "val"))
    return _Found(root.resolve().name, "folders", names, coding, train, val)


def _find_one_folder(root: Path, classes: Path | None) -> _Found:
    """Halves rather than every other one: neighbours by name are often frames of one film, alike to the pixel."""
    names, coding = _listed_classes(root, classes)
    pairs, skipped = pairs_in_folders(root / "images", root / "masks")
    if len(pairs) < 2:
        reason = f" ({skipped[0].item}: {skipped[0].reason})" if skipped else ""
        raise EvaluationError(
            f"{root}: expected at least 2 photos with masks in images and masks, to make train and val of them, found "
            f"{len(pairs)}{reason}"
        )
    half = (len(pairs) + 1) // 2
    train = _Split(pairs[:half], [entry for entry in skipped if entry.item < pairs[half].id])
    val = _Split(pairs[half:], [entry for entry in skipped if entry.item >= pairs[half].id])
    note = f"no splits in the folder: the first {half} of {len(pairs)} pairs by name are train, the others val"
    return _Found(root.resolve().name, "folders", names, coding, train, val, note)


def _listed_classes(root: Path, classes: Path | None) -> tuple[tuple[str, ...], Coding]:
    source = classes or root / "classes.txt"
    names = read_class_list(source)
    count = len(names)
    # The number right after the last class is a common mark for no label, 255 another unless it is a class itself.
    ignored = (count,) if count >= 255 else (count, 255)
    return names, Coding(count, str(source), ignored=ignored)


def _refuse(classes: Path | None, name: str) -> None:
    if classes is not None:
        raise EvaluationError(f"{name} has its own classes, expected no list of them, got {classes}; leave it out")


_ARRANGEMENTS = (
    _Arrangement(
        "VOC 2012",
        (".", "VOC2012", "VOCdevkit/VOC2012"),
        (
            "JPEGImages",
            "SegmentationClass",
            "ImageSets/Segmentation/train.txt",
            "ImageSets/Segmentation/val.txt",
        ),
        _find_voc,
    ),
    _Arrangement(
        "ADE20K",
        (".", "ADEChallengeData2016"),
        ("images/training", "images/validation", "annotations/training", "annotations/validation"),
        _find_ade,
    ),
    _Arrangement(
        "folders with splits", (".",), ("train/images", "train/masks", "val/images", "val/masks"), _find_splits
    ),
    # Not without splits: halves by name would mix what their owner has kept apart.
    _Arrangement(
        "folders with splits inside",
        (".",),
        ("images/train", "images/val", "masks/train", "masks/val"),
        _find_splits_inside,
    ),
    _Arrangement("folders without splits", (".",), ("images", "masks"), _find_one_folder),
)


_EXPECTED = (
    "VOC 2012 (JPEGImages, SegmentationClass, ImageSets/Segmentation with train.txt and val.txt), ADE20K (images and "
    "annotations, each with training and validation), or photos and masks of the same names in train/images, "
    "train/masks, val/images and val/masks (or images/train, ...), or in images and masks alone, with classes.txt"
)
