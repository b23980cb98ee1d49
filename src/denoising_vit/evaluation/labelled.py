"""Photos with class masks: VOC 2012, ADE20K, or folders of photos and masks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from denoising_vit.data.photos import photo_digest, read_photo
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import EvaluationData, EvaluationImage, EvaluationSet, described, shared_photos
from denoising_vit.evaluation.layouts import (
    Layout,
    Pair,
    Pairs,
    at_most,
    check_same_size,
    find_layout,
    inspect_all,
    pairs_in_folders,
    pairs_in_list,
    read_lines,
    read_text,
    readable,
    require_usable,
)
from denoising_vit.evaluation.masks import Coding, read_mask

#: Classes of Pascal VOC in the order of their labels.
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

#: Number of classes in ADE20K's scene parsing benchmark.
ADE_CLASSES = 150

#: Fraction of unlabelled pixels above which a class that never occurs is reported; borders of objects are about 0.05.
_COMMON = 0.1

_REMEDY = "Write the class names into it, one per line, starting with label 0"


@dataclass(frozen=True)
class LabelledImage(EvaluationImage):
    """A photo with a class for each pixel.

    Attributes:
        mask: file of the mask, which has the photo's size.
        coding: meaning of the mask's values.
        mask_digest: digest of the labels.
        class_pixels: labelled pixels of each class, K of them.
    """

    mask: Path
    coding: Coding
    mask_digest: str
    class_pixels: tuple[int, ...]

    @property
    def classes(self) -> int:
        """Number of classes, K."""
        return self.coding.classes

    @property
    def truth_digest(self) -> str:
        """Digest of the labels."""
        return self.mask_digest

    def labels(self) -> Tensor:
        """Read the classes (H, W) int64: 0 to K - 1, NO_LABEL for pixels without a label."""
        return torch.from_numpy(read_mask(self.mask, self.coding))


@dataclass(frozen=True)
class LabelledSet(EvaluationSet[LabelledImage]):
    """One split, in a fixed order.

    Attributes:
        class_names: names of classes 0 to K - 1.
    """

    class_names: tuple[str, ...]

    @cached_property
    def pixels(self) -> tuple[int, ...]:
        """Labelled pixels of each class, K of them."""
        return tuple(sum(image.class_pixels[label] for image in self.images) for label in range(len(self.class_names)))

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes that no pixel has."""
        return tuple(name for name, count in zip(self.class_names, self.pixels, strict=True) if count == 0)


@dataclass(frozen=True)
class LabelledData(EvaluationData[LabelledSet]):
    """A labelled data set with two splits, ``train`` and ``val``.

    Attributes:
        score: classes to score; empty for all. The others can still be predicted.
    """

    score: tuple[str, ...] = ()

    @property
    def scored_columns(self) -> list[int]:
        """Labels of the scored classes."""
        return [label for label, name in enumerate(self.val.class_names) if not self.score or name in self.score]

    @property
    def scored(self) -> tuple[str, ...]:
        """Names of the scored classes in the order of their labels."""
        return tuple(self.val.class_names[label] for label in self.scored_columns)

    @property
    def absent(self) -> tuple[str, ...]:
        """Scored classes that do not occur in ``val``."""
        return tuple(name for name in self.val.absent if name in self.scored)

    def require_two_classes(self) -> None:
        """Reject data with fewer than two scored classes, where any prediction would score 100.

        Raises:
            EvaluationError: if the masks of ``val`` contain fewer than two scored classes.
        """
        there = [name for name in self.scored if name not in self.absent]
        if len(there) < 2:
            held, note = " and ".join(there) or "none", f". {self.note}" if self.note else ""
            raise EvaluationError(
                f"{self.name}: expected at least two classes in val's masks, found {held} of {len(self.scored)}{note}"
            )

    def scoring(self, score: Sequence[str]) -> LabelledData:
        """Return the same data with only these classes scored; if ``score`` is empty, all are scored.

        Raises:
            EvaluationError: if a name is not a class of the data, or fewer than two classes remain.
        """
        names = self.val.class_names
        unknown = [name for name in score if name not in names]
        if unknown or len(set(score)) != len(score) or len(score) == 1:
            raise EvaluationError(
                f"score must be two or more different classes of {self.name}, got {', '.join(score)}; "
                f"its classes: {', '.join(names)}"
            )
        return replace(self, score=tuple(name for name in names if name in score))


class _Files(NamedTuple):
    """Files of a data set, not yet read."""

    name: str
    class_names: tuple[str, ...]
    coding: Coding
    train: Pairs
    val: Pairs
    note: str | None = None


def open_labelled(
    path: str | Path, *, classes: Path | None = None, images: int = 0, progress: Callable[[], None] | None = None
) -> LabelledData:
    """Open a labelled data set, reading every photo and mask once.

    Layouts: VOC 2012 as unpacked; ADE20K (scene parsing, 150 classes) as unpacked; photos and masks with the same names
    in ``train/images``, ``train/masks``, ``val/images`` and ``val/masks`` (or ``images/train`` and so on); or in
    ``images`` and ``masks`` alone, where the first half by name becomes train. The folder layouts need ``classes.txt``,
    a list of class names.

    Args:
        path: the folder.
        classes: file with class names, one per line, instead of ``classes.txt``; not for VOC 2012 and ADE20K.
        images: maximum number of images per split, spread evenly; 0 uses all.
        progress: called after each image.

    Raises:
        EvaluationError: if the folder matches no layout, has no list of classes, or has no usable photo in a split.
    """
    layout, root = find_layout(Path(path), _LAYOUTS)
    with readable(root):
        files = layout.open(root, classes)
    train, val = (
        _opened(root, split, files, found, images, progress)
        for split, found in (("train", files.train), ("val", files.val))
    )
    notes = [note for note in (files.note, shared_photos(train, val), _ignored_note(val, files.coding)) if note]
    return LabelledData(files.name, layout.name, (train, val), "; ".join(notes) or None)


def _opened(
    root: Path, split: str, files: _Files, found: Pairs, images: int, progress: Callable[[], None] | None
) -> LabelledSet:
    pairs = at_most(found.pairs, images)
    usable, failed = inspect_all(lambda pair: _inspect(split, pair, files.coding), pairs, progress)
    skipped = [*found.skipped, *failed]
    require_usable(usable, f"photos with masks for the split {split}", len(pairs), skipped, root)
    return LabelledSet(split, tuple(usable), files.class_names, skipped=tuple(skipped))


def _inspect(split: str, pair: Pair, coding: Coding) -> LabelledImage:
    photo = read_photo(pair.photo)
    labels = read_mask(pair.mask, coding)
    check_same_size(photo.shape, labels.shape, pair.mask)
    return LabelledImage(
        **described(split, pair.id, pair.photo, photo),
        mask=pair.mask,
        coding=coding,
        mask_digest=photo_digest(labels.astype("<i4")),  # the same on every machine
        class_pixels=tuple(np.bincount(labels[labels >= 0], minlength=coding.classes).tolist()),
    )


def _ignored_note(split: LabelledSet, coding: Coding) -> str | None:
    """Note if a class never occurs while many pixels have no label: the class may use a value that means no label."""
    unlabelled = 1 - sum(split.pixels) / sum(image.height * image.width for image in split.images)
    if not split.absent or unlabelled < _COMMON:
        return None
    numbers = " and ".join(map(str, coding.ignored))
    return (
        f"{', '.join(split.absent)}: never in the masks of {split.split}, while {100 * unlabelled:.0f} % of their "
        f"pixels have {numbers}, which means no label; if it is meant as a class, write the class number instead"
    )


# --- lists of classes ---


def read_class_list(path: Path) -> tuple[str, ...]:
    """Read class names, one per line, starting with label 0.

    Raises:
        EvaluationError: if the file is missing or has no name, an empty line among names, or a duplicate name.
    """
    if not path.is_file():
        raise EvaluationError(f"{path}: expected a list of classes, found no such file. {_REMEDY}")
    names = [line.strip() for line in read_text(path).rstrip().split("\n")]
    if names == [""]:
        raise EvaluationError(f"{path}: expected a list of classes, found an empty file. {_REMEDY}")
    first: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name:
            # Skipping it would shift the labels of all later classes.
            raise EvaluationError(f"{path}: line {number} is empty; expected the name of label {number - 1}")
        if first.setdefault(name, number) != number:
            raise EvaluationError(
                f"{path}: line {number} is {name!r}, the same as line {first[name]}; expected a unique name per class"
            )
    return tuple(names)


def read_ade_names(table: Path) -> tuple[str, ...]:
    """Names from ADE20K's ``objectInfo150.txt``, or ``class 1`` to ``class 150`` if that is missing."""
    if not table.is_file():
        return tuple(f"class {number}" for number in range(1, ADE_CLASSES + 1))
    rows = [line.split("\t") for line in read_lines(table)][1:]
    if [row[0].strip() for row in rows] != [str(number) for number in range(1, ADE_CLASSES + 1)]:
        raise EvaluationError(
            f"{table}: expected a header, then classes 1 to {ADE_CLASSES} in tab-separated columns (number first, name "
            f"last); found {len(rows)} other rows. Download the file again, or delete it"
        )
    return tuple(row[-1].strip() for row in rows)


# --- layouts ---


def _open_voc(root: Path, classes: Path | None) -> _Files:
    _refuse(classes, "VOC 2012")
    lists, photos, masks = root / "ImageSets" / "Segmentation", root / "JPEGImages", root / "SegmentationClass"
    train, val = (pairs_in_list(lists / f"{name}.txt", photos, masks) for name in ("train", "val"))
    # Only 255, the border around objects, means no label; the value right after the last class does not.
    coding = Coding(len(VOC_CLASSES), "VOC 2012", ignored=(255,))
    year = root.name.removeprefix("VOC")  # other years have the same layout
    name = f"VOC {year}" if root.name.startswith("VOC") and year.isdigit() else "VOC 2012"
    return _Files(name, VOC_CLASSES, coding, train, val)


def _open_ade(root: Path, classes: Path | None) -> _Files:
    _refuse(classes, "ADE20K")
    names = read_ade_names(root / "objectInfo150.txt")
    coding = Coding(ADE_CLASSES, "ADE20K", shift=1, ignored=(0, 255))
    train, val = (
        pairs_in_folders(root / "images" / name, root / "annotations" / name) for name in ("training", "validation")
    )
    return _Files("ADE20K", names, coding, train, val)


def _open_splits(root: Path, classes: Path | None, photos: str, masks: str) -> _Files:
    names, coding = _listed_classes(root, classes)
    train, val = (
        pairs_in_folders(root / photos.format(split=split), root / masks.format(split=split))
        for split in ("train", "val")
    )
    return _Files(root.resolve().name, names, coding, train, val)


def _open_one_folder(root: Path, classes: Path | None) -> _Files:
    """Split into halves by name, not at random: neighbours by name are often nearly identical frames of a video."""
    names, coding = _listed_classes(root, classes)
    pairs, skipped = pairs_in_folders(root / "images", root / "masks")
    if len(pairs) < 2:
        reason = f" ({skipped[0].item}: {skipped[0].reason})" if skipped else ""
        raise EvaluationError(
            f"{root}: expected at least 2 photos with masks in images and masks, to split into train and val; found "
            f"{len(pairs)}{reason}"
        )
    half = (len(pairs) + 1) // 2
    train = Pairs(pairs[:half], [entry for entry in skipped if entry.item < pairs[half].id])
    val = Pairs(pairs[half:], [entry for entry in skipped if entry.item >= pairs[half].id])
    note = f"no splits in the folder: the first {half} of {len(pairs)} pairs by name are train, the others val"
    return _Files(root.resolve().name, names, coding, train, val, note)


def _listed_classes(root: Path, classes: Path | None) -> tuple[tuple[str, ...], Coding]:
    source = classes or root / "classes.txt"
    names = read_class_list(source)
    count = len(names)
    # The value right after the last class often means no label; so does 255, unless it is a class.
    ignored = (count,) if count >= 255 else (count, 255)
    return names, Coding(count, str(source), ignored=ignored)


def _refuse(classes: Path | None, name: str) -> None:
    if classes is not None:
        raise EvaluationError(f"{name} has fixed classes, got a list of classes ({classes}); omit it")


_LAYOUTS: tuple[Layout[Callable[[Path, Path | None], _Files]], ...] = (
    Layout(
        "VOC 2012",
        ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/val.txt"),
        _open_voc,
        (".", "VOC2012", "VOCdevkit/VOC2012"),
        name="voc2012",
    ),
    Layout(
        "ADE20K",
        ("images/training", "images/validation", "annotations/training", "annotations/validation"),
        _open_ade,
        (".", "ADEChallengeData2016"),
        name="ade20k",
    ),
    Layout(
        "folders with splits",
        ("train/images", "train/masks", "val/images", "val/masks"),
        functools.partial(_open_splits, photos="{split}/images", masks="{split}/masks"),
        name="folders",
    ),
    # Must come before folders without splits, which would also match and mix both splits.
    Layout(
        "folders with splits inside",
        ("images/train", "images/val", "masks/train", "masks/val"),
        functools.partial(_open_splits, photos="images/{split}", masks="masks/{split}"),
        name="folders",
    ),
    Layout("folders with classes.txt and no splits", ("images", "masks"), _open_one_folder, name="folders"),
)
