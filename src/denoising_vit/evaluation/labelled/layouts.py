"""Which labelled data set a folder holds: VOC 2012, ADE20K, or folders of photos and masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from denoising_vit.data import Skipped, spread
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.judged import shared_photos
from denoising_vit.evaluation.labelled.classes import ADE_CLASSES, VOC_CLASSES, read_ade_names, read_class_list
from denoising_vit.evaluation.labelled.images import Coding
from denoising_vit.evaluation.labelled.sets import LabelledSet, inspect
from denoising_vit.evaluation.layouts import Pair, check_count, listed, pairs_in_folders, pairs_in_list

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
