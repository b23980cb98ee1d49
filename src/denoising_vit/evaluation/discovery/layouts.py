"""Which data set of photos and boxes a folder holds: VOC, COCO, DAVIS, or folders of photos and masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from denoising_vit.data import Skipped, spread
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import JudgedSet, SplitData
from denoising_vit.evaluation.discovery.coco import coco_candidates
from denoising_vit.evaluation.discovery.images import BoxedImage
from denoising_vit.evaluation.discovery.inspecting import Candidate, Inspected, inspect
from denoising_vit.evaluation.discovery.masks import MaskTruth
from denoising_vit.evaluation.discovery.voc import VocTruth
from denoising_vit.evaluation.layouts import check_count, listed, pairs_in_folders, read_text
from denoising_vit.evaluation.masks import WHITE

#: What layout has photos in sequences.
DAVIS = "davis"

#: How many names of a folder an error shows.
_SHOWN = 8


@dataclass(frozen=True)
class _Asked:
    """What is asked of a data set beyond its folder."""

    split: str | None = None
    difficult: bool = True
    annotations: Path | None = None
    names: Path | None = None

    def check(self, title: str, *allowed: str) -> None:
        """Refuses what means nothing in a layout."""
        for name, nothing in {"split": None, "difficult": True, "annotations": None, "names": None}.items():
            if name not in allowed and getattr(self, name) != nothing:
                raise EvaluationError(f"{name} has no meaning for {title}, got {getattr(self, name)}; leave it out")


@dataclass(frozen=True)
class _Found:
    """A data set whose files are known and not yet read."""

    name: str
    layout: str
    candidates: list[Candidate]
    skipped: list[Skipped] = field(default_factory=list)
    note: str | None = None


class _Arrangement(NamedTuple):
    """What has to be where; ``roots`` are places below the given folder where that may begin."""

    title: str
    roots: tuple[str, ...]
    required: tuple[str, ...]
    find: Callable[[Path, _Asked], _Found]


def open_boxed(
    path: str | Path,
    *,
    images: int = 0,
    split: str | None = None,
    difficult: bool = True,
    annotations: Path | None = None,
    names: Path | None = None,
    progress: Callable[[], None] | None = None,
) -> SplitData[BoxedImage]:
    """Opens a data set of photos with boxes around their objects; every photo and annotation that is taken is read.

    Known layouts: VOC 2007 or 2012 as it is unpacked (JPEGImages, Annotations, ImageSets/Main); COCO (annotations with
    a JSON file, photos in a folder beside it); DAVIS (JPEGImages/480p and Annotations/480p, each with a folder for each
    sequence); photos and masks of the same names in ``images`` and ``masks``. In masks, each number from 1 to 50 is an
    object and 255 is none; where the masks of a data set hold 0 and 255 alone, 255 is the object.

    Args:
        path: the folder.
        images: at most so many, spread evenly; 0 takes all.
        split: VOC: the list in ImageSets/Main, trainval where none is given; COCO: what follows instances_ in the name
            of the JSON file, where there are several; DAVIS: a list of sequences in ImageSets, such as 2016/val.
        difficult: VOC: whether objects count that are marked as difficult or truncated, as in LOST's evaluation, which
            leaves them out in its setting ``no_hard`` alone.
        annotations: COCO: the JSON file, where it is not in the folder annotations or there are several.
        names: COCO: a list of names or ids of photos, one a line, as COCO20k comes with.
        progress: called after each image.

    Raises:
        EvaluationError: if there is no such layout, more than one, or nothing usable.
    """
    check_count(images)
    root = Path(path)
    try:
        found = _find(root, _Asked(split, difficult, annotations, names))
    except OSError as error:  # a folder that may not be looked into, a name too long for the file system
        raise EvaluationError(f"{root}: cannot be read ({error.strerror or error})") from error
    chosen = [found.candidates[index] for index in spread(len(found.candidates), images)]
    inspected, failed = _without_void(*inspect(chosen, progress))
    skipped = (*found.skipped, *failed)
    if not inspected:
        first = f"; the first reason: {skipped[0].item}: {skipped[0].reason}" if skipped else ""
        raise EvaluationError(
            f"{root}: expected photos with boxes ({found.name}), none of {len(chosen)} can be used{first}"
        )
    val = JudgedSet("val", tuple(one.image for one in inspected), skipped=skipped)
    return SplitData(found.name, found.layout, (val,), found.note)


def _without_void(inspected: list[Inspected], failed: list[Skipped]) -> tuple[list[Inspected], list[Skipped]]:
    """Leaves out masks that hold 255 alone, where others number their objects: there 255 is no object."""
    white = frozenset({WHITE})
    if all(one.numbers == white for one in inspected):
        return inspected, failed
    reason = f"no object: the mask holds only 0 and {WHITE}, which is no object where other masks number theirs"
    void = [Skipped(one.image.id, reason) for one in inspected if one.numbers == white]
    return [one for one in inspected if one.numbers != white], [*failed, *void]


def _find(path: Path, asked: _Asked) -> _Found:
    if not path.is_dir():
        what = "a file" if path.exists() else "nothing"
        raise EvaluationError(f"{path}: expected the folder of a data set with boxes or masks, found {what} there")
    partly = []
    for arrangement in _ARRANGEMENTS:
        roots = []
        for root in (path / below for below in arrangement.roots):
            missing = [_told(root, name) for name in arrangement.required if not _is_there(root, name)]
            if not missing:
                roots.append(root)
            elif missing != list(arrangement.required):
                partly.append(f"{root} looks like {arrangement.title}, but lacks {', '.join(missing)}")
        if len(roots) > 1:
            raise EvaluationError(f"{path} has {' and '.join(map(str, roots))}; give one of them")
        if roots:
            return arrangement.find(roots[0], asked)
    if asked.annotations is not None:
        return _find_coco(path, asked)
    raise EvaluationError(_unknown(path, partly))


def _is_there(root: Path, name: str) -> bool:
    return any(root.glob(name)) if "*" in name else (root / name).is_dir()


def _told(root: Path, name: str) -> str:
    return f"{name} (a file, expected a folder)" if (root / name).is_file() else name


def _unknown(path: Path, partly: list[str]) -> str:
    if partly:
        return f"{partly[0]}; expected {_EXPECTED}"  # the more particular layouts come first
    return f"{path}: expected {_EXPECTED}; found {listed(path)}"


# --- VOC ---


def _find_voc(root: Path, asked: _Asked) -> _Found:
    asked.check("VOC", "split", "difficult")
    split = asked.split or "trainval"
    lists = root / "ImageSets" / "Main"
    names, skipped = _names_in(lists, split)
    candidates = [
        Candidate(
            f"{name}.jpg",
            root / "JPEGImages" / f"{name}.jpg",
            VocTruth(root / "Annotations" / f"{name}.xml", asked.difficult),
            f"{name}.jpg",
        )
        for name in names
    ]
    year = root.resolve().name.removeprefix("VOC")
    title = f"VOC {year} {split}" if year.isdigit() else f"VOC {split}"
    note = None if asked.difficult else "objects marked as difficult or truncated are left out"
    return _Found(title, "voc", candidates, skipped, note)


def _names_in(lists: Path, split: str) -> tuple[list[str], list[Skipped]]:
    """Lines of a list, each once, and those that repeat an earlier one."""
    path = lists / f"{split}.txt"
    if not path.is_file():
        raise EvaluationError(f"{path}: expected a list of names, one a line, found no such file; {listed(lists)}")
    counts = Counter(line for line in map(str.strip, read_text(path).split("\n")) if line)
    if not counts:
        raise EvaluationError(f"{path}: expected names, one a line, found none")
    again = [Skipped(name, f"named {count} times in {path}, taken once") for name, count in counts.items() if count > 1]
    return list(counts), again


# --- COCO ---


def _find_coco(root: Path, asked: _Asked) -> _Found:
    asked.check("COCO", "split", "annotations", "names")
    annotations = asked.annotations or _annotations(root / "annotations", asked.split)
    split = annotations.stem.removeprefix("instances_")
    likely = (root / split, root / "images" / split, root / "images")
    others = (entry for entry in sorted(root.iterdir()) if entry.name != "annotations" and entry.name[0] != ".")
    folders = list(dict.fromkeys(folder for folder in (*likely, *others, root) if folder.is_dir()))
    candidates, skipped = coco_candidates(annotations, folders, asked.names)
    note = f"only photos that {asked.names.name} names" if asked.names else None
    return _Found(f"COCO {split}", "coco", candidates, skipped, note)


def _annotations(folder: Path, split: str | None) -> Path:
    """The JSON file that holds boxes."""
    if split is not None:
        path = folder / f"instances_{split}.json"
        return path if path.is_file() else folder / f"{split}.json"
    found = sorted(folder.glob("instances_*.json")) or sorted(folder.glob("*.json"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:_SHOWN])
        raise EvaluationError(f"{folder} has {len(found)} JSON files ({names}); say which one (annotations, or split)")
    return found[0]


# --- masks ---


def _find_davis(root: Path, asked: _Asked) -> _Found:
    asked.check("DAVIS", "split")
    every = _masked(root / "JPEGImages" / "480p", root / "Annotations" / "480p", in_sequences=True)
    name = "DAVIS" if asked.split is None else f"DAVIS {asked.split}"
    if asked.split is None:
        return _Found(name, DAVIS, *every, note=_AROUND)
    wanted = _sequences(root / "ImageSets", asked.split)
    candidates = [one for one in every[0] if one.sequence in wanted]
    skipped = [one for one in every[1] if PurePosixPath(one.item).parts[0] in wanted]
    there = {one.sequence for one in candidates}
    skipped += [Skipped(name, "a sequence of the list, of which no frame has a mask") for name in wanted - there]
    return _Found(name, DAVIS, candidates, sorted(skipped, key=lambda one: one.item), _AROUND)


def _sequences(lists: Path, split: str) -> set[str]:
    """Names in a list: of sequences (DAVIS 2017), or of photos and masks with their paths (DAVIS 2016)."""
    paths = [lists / f"{split}.txt", *sorted(lists.glob(f"*/{split}.txt"))]
    found = [path for path in paths if path.is_file()]
    if len(found) != 1:
        what = " and ".join(map(str, found)) or "none"
        raise EvaluationError(f"{lists}: expected one list {split}.txt, here or in a folder below, found {what}")
    lines = (line.split()[0] for line in read_text(found[0]).split("\n") if line.strip())
    return {PurePosixPath(line).parent.name or line for line in lines}


def _find_folders(root: Path, asked: _Asked) -> _Found:
    asked.check("photos and masks in folders")
    candidates, skipped = _masked(root / "images", root / "masks", in_sequences=False)
    return _Found(root.resolve().name, "masks", candidates, skipped, _AROUND)


def _masked(photos: Path, masks: Path, *, in_sequences: bool) -> tuple[list[Candidate], list[Skipped]]:
    pairs, skipped = pairs_in_folders(photos, masks)
    return [
        Candidate(
            pair.id, pair.photo, MaskTruth(pair.mask), PurePosixPath(pair.id).parts[0] if in_sequences else pair.id
        )
        for pair in pairs
    ], skipped


_AROUND = "boxes are those around the objects of masks"

_ARRANGEMENTS: Sequence[_Arrangement] = (
    _Arrangement("DAVIS", (".", "DAVIS"), ("JPEGImages/480p", "Annotations/480p"), _find_davis),
    _Arrangement(
        "VOC",
        (".", "VOC2007", "VOC2012", "VOCdevkit/VOC2007", "VOCdevkit/VOC2012"),
        ("JPEGImages", "Annotations", "ImageSets/Main"),
        _find_voc,
    ),
    _Arrangement("COCO", (".",), ("annotations/*.json",), _find_coco),
    _Arrangement("folders of photos and masks", (".",), ("images", "masks"), _find_folders),
)

_EXPECTED = (
    "VOC (JPEGImages, Annotations, and ImageSets/Main with trainval.txt), COCO (annotations with a JSON file, and a "
    "folder of photos), DAVIS (JPEGImages/480p and Annotations/480p), or photos and masks of the same names in images "
    "and masks"
)
