"""Videos with masks of objects, as DAVIS has them: frames that can be used, and what cannot and why."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

from denoising_vit.data import Skipped, spread
from denoising_vit.data.photos import IMAGE_SUFFIXES, photo_digest, read_photo
from denoising_vit.errors import EvaluationError, PhotoError
from denoising_vit.evaluation.correspondence.folders import DAVIS, folders_in, images_in, locate
from denoising_vit.evaluation.correspondence.masks import Objects, read_values
from denoising_vit.evaluation.data import JudgedImage, JudgedSet, SplitData
from denoising_vit.evaluation.layouts import listed, read_text

#: Decoding releases Python's lock; more threads than this gain little and hold more photos in memory.
_THREADS = 4

#: Resolutions in the order in which they are taken where there are several.
_RESOLUTIONS = ("480p", "Full-Resolution", "1080p")


@dataclass(frozen=True)
class Frame(JudgedImage):
    """One frame of a sequence.

    Attributes:
        sequence: its name.
        mask: the file of the mask, of the frame's size; None where there is none that can be used.
        coding: what the numbers in the sequence's masks mean.
        mask_digest: of the labels; empty where there is no mask.
    """

    sequence: str
    mask: Path | None
    coding: Objects
    mask_digest: str

    @property
    def objects(self) -> tuple[int, ...]:
        """Numbers of the sequence's objects."""
        return self.coding.numbers

    @property
    def truth_digest(self) -> str:
        """Of the sequence, its objects and the labels."""
        return f"{self.sequence}\0{self.objects}\0{self.mask_digest}"

    def labels(self) -> Tensor:
        """Numbers of objects (H, W) int64, 0 for all else, NO_LABEL where there is none.

        Raises:
            EvaluationError: if there is no mask, or it can no longer be read.
        """
        if self.mask is None:
            raise EvaluationError(f"{self.id}: expected a frame with a mask, this one has none")
        labels, _ = self.coding.labels(read_values(self.mask), str(self.mask))
        return torch.from_numpy(labels)


@dataclass(frozen=True)
class ClipData(SplitData[Frame]):
    """Videos, in one split; the frames of each stand together, in order."""

    @property
    def clips(self) -> list[tuple[Frame, ...]]:
        """The frames of each sequence; the first of each has a mask, and at least one later one."""
        return [tuple(frames) for _, frames in itertools.groupby(self.val.images, lambda frame: frame.sequence)]


def open_clips(path: str | Path, *, progress: Callable[[], None] | None = None, sequences: int = 0) -> ClipData:
    """Opens videos in the layout of DAVIS; every frame and mask that is taken is read once.

    Frames are in ``JPEGImages/<resolution>/<sequence>``, masks of the same names in
    ``Annotations/<resolution>/<sequence>``: 0 and 255 as in DAVIS 2016, or numbers of objects as in DAVIS 2017. Of
    several resolutions 480p is taken. Sequences are those of ``ImageSets/2017/val.txt``, or of that of the resolution,
    or of 2016; without such a list, all.

    Only the first frame has to have a mask, and one later one; labels are carried through frames without.

    Args:
        path: the folder.
        progress: called after each frame.
        sequences: at most so many, spread evenly; 0 takes all.

    Raises:
        EvaluationError: if there is no such layout, or nothing usable in it.
    """
    if sequences < 0:
        raise EvaluationError(f"expected a number of sequences of at least 1, or 0 for all, got {sequences}")
    root = locate(Path(path), [DAVIS])[1]
    try:
        resolution = _resolution(root)
        names, source, skipped = _sequences(root, resolution)
        chosen = [names[index] for index in spread(len(names), sequences)]
        frames, failed = _inspected(root, resolution, chosen, progress)
    except OSError as error:  # a folder that may not be looked into
        raise EvaluationError(f"{root}: cannot be read ({error.strerror or error})") from error
    skipped += failed
    if not frames:
        first = f"; the first reason: {skipped[0].item}: {skipped[0].reason}" if skipped else ""
        raise EvaluationError(
            f"{root}: expected sequences of frames with masks, none of {len(chosen)} can be used{first}"
        )
    note = None if source else "no list of sequences (ImageSets/2017/val.txt): all are judged"
    name = _name(frames) if source else root.resolve().name
    return ClipData(name, DAVIS.layout, (JudgedSet("val", tuple(frames), skipped=tuple(skipped)),), note)


def _name(frames: Sequence[Frame]) -> str:
    kinds = {frame.coding.binary for frame in frames}
    return "DAVIS" if len(kinds) > 1 else "DAVIS 2016" if kinds.pop() else "DAVIS 2017"


def _resolution(root: Path) -> str:
    there = [folders_in(root / name) for name in DAVIS.required]
    both = [name for name in there[0] if name in there[1]]
    known = [name for name in _RESOLUTIONS if name in both]
    if known or len(both) == 1:
        return (known or both)[0]
    raise EvaluationError(
        f"{root}: expected one folder of a resolution, such as 480p, in both JPEGImages and Annotations; found "
        f"{listed(root / 'JPEGImages')} and {listed(root / 'Annotations')}"
    )


def _sequences(root: Path, resolution: str) -> tuple[list[str], Path | None, list[Skipped]]:
    """Names of sequences, the list that they are from, and those of the list that are not there."""
    there = folders_in(root / "JPEGImages" / resolution)
    lists = (root / "ImageSets" / kind / "val.txt" for kind in ("2017", resolution, "2016"))
    source = next((path for path in lists if path.is_file()), None)
    if source is None:
        return there, None, []
    named = dict.fromkeys(_sequence_of(line.split()[0]) for line in read_text(source).split("\n") if line.strip())
    if not named:
        raise EvaluationError(f"{source}: expected names of sequences, one a line, found none")
    missing = [
        Skipped(name, f"named in {source}, but there is no folder {root / 'JPEGImages' / resolution / name}")
        for name in named
        if name not in there
    ]
    return [name for name in named if name in there], source, missing


def _sequence_of(entry: str) -> str:
    """DAVIS 2017 lists sequences, DAVIS 2016 each frame: /JPEGImages/480p/<sequence>/00000.jpg."""
    path = PurePosixPath(entry)
    return path.parent.name if path.suffix.lower() in IMAGE_SUFFIXES else path.name


class _Found(NamedTuple):
    """One frame, inspected, with numbers of objects that are not the sequence's; and why its mask is of no use."""

    frame: Frame
    others: tuple[int, ...] = ()
    reason: str | None = None


class _Files(NamedTuple):
    """One frame, not yet read."""

    sequence: str
    photo: Path
    mask: Path | None

    @property
    def id(self) -> str:
        return f"{self.sequence}/{self.photo.name}"


def _inspected(
    root: Path, resolution: str, sequences: Sequence[str], progress: Callable[[], None] | None
) -> tuple[list[Frame], list[Skipped]]:
    frames: list[Frame] = []
    skipped: list[Skipped] = []
    pool = ThreadPoolExecutor(_THREADS, "clips")
    try:
        for name in sequences:
            files, twice = _files(root, resolution, name)
            skipped += twice
            try:
                found, reasons = _sequence(root / "Annotations" / resolution / name, files, pool, progress)
            except (EvaluationError, PhotoError, OSError) as error:
                skipped.append(Skipped(name, str(error)))
            else:
                frames += found
                skipped += reasons
    finally:
        pool.shutdown(cancel_futures=True)  # whoever interrupts does not wait for the rest
    return frames, skipped


def _files(root: Path, resolution: str, sequence: str) -> tuple[list[_Files], list[Skipped]]:
    """Frames in order, each with the mask of its name; and second files of one name, and masks of no frame."""
    folders = [root / kind / resolution / sequence for kind in DAVIS.required]
    skipped: list[Skipped] = []
    photos, masks = (_by_stem(folder, sequence, skipped) for folder in folders)
    skipped += [
        Skipped(f"{sequence}/{path.name}", f"a mask without a frame; expected {folders[0] / stem}.jpg")
        for stem, path in masks.items()
        if stem not in photos
    ]
    return [_Files(sequence, photo, masks.get(stem)) for stem, photo in photos.items()], skipped


def _by_stem(folder: Path, sequence: str, skipped: list[Skipped]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name in images_in(folder):
        path = folder / name
        if path.stem in found:
            reason = f"a second file of the name {path.stem}; {found[path.stem].name} is taken"
            skipped.append(Skipped(f"{sequence}/{name}", reason))
        else:
            found[path.stem] = path
    return found


def _sequence(
    masks: Path, files: list[_Files], pool: ThreadPoolExecutor, progress: Callable[[], None] | None
) -> tuple[list[Frame], list[Skipped]]:
    """The frames of a sequence that can be used.

    Raises:
        EvaluationError: if nothing can be carried, or nothing judged.
        PhotoError: if the first frame cannot be read.
    """
    if len(files) < 2:
        raise EvaluationError(_alone(len(files)))
    start, *later = files
    if start.mask is None:
        raise EvaluationError(f"the first frame has no mask; expected {masks / start.photo.stem}.png")
    first = _inspect(start, Objects.first(read_values(start.mask), str(start.mask)), None)
    if first.reason:
        raise EvaluationError(first.reason)
    size = first.frame.height, first.frame.width
    frames, others, skipped = [first.frame], set[int](), []
    _tell(progress)
    for found in pool.map(lambda frame: _inspect_later(frame, first.frame.coding, size), later):
        _tell(progress)
        if isinstance(found, Skipped):
            skipped.append(found)
            continue
        frames.append(found.frame)
        others |= set(found.others)
        if found.reason:
            skipped.append(Skipped(found.frame.id, f"carried through, but not judged: {found.reason}"))
    _check(frames, skipped)
    return frames, _remarks(files, others) + skipped


def _tell(progress: Callable[[], None] | None) -> None:
    if progress is not None:
        progress()


def _alone(count: int) -> str:
    return "a sequence of one frame: nothing to carry a label to" if count else "a sequence without frames"


def _check(frames: Sequence[Frame], skipped: Sequence[Skipped]) -> None:
    reason = f" ({skipped[0].item}: {skipped[0].reason})" if skipped else ""
    if len(frames) < 2:
        raise EvaluationError(f"{_alone(1)}{reason}")
    if all(frame.mask is None for frame in frames[1:]):
        raise EvaluationError(f"no frame after the first has a mask: nothing to judge{reason}")


def _remarks(files: Sequence[_Files], others: set[int]) -> list[Skipped]:
    """One entry a sequence rather than one a frame: videos may have masks of every fifth frame only."""
    bare = [file.photo.name for file in files if file.mask is None]
    remarks = []
    if bare:
        reason = f"{len(bare)} of {len(files)} frames have no mask ({bare[0]} first): carried through, but not judged"
        remarks.append(reason)
    if others:
        numbers = f"object{'s' if len(others) > 1 else ''} {', '.join(map(str, sorted(others)))}"
        remarks.append(f"not in the first mask, so left out: {numbers}")
    return [Skipped(files[0].sequence, reason) for reason in remarks]


def _inspect_later(files: _Files, coding: Objects, size: tuple[int, int]) -> _Found | Skipped:
    try:
        return _inspect(files, coding, size)
    except PhotoError as error:
        return Skipped(files.id, str(error).removeprefix(f"{files.photo}: "))  # the id names the photo already
    except (EvaluationError, OSError) as error:
        return Skipped(files.id, str(error))


def _inspect(files: _Files, coding: Objects, size: tuple[int, int] | None) -> _Found:
    """Reads one frame and its mask.

    Raises:
        PhotoError: if the frame cannot be read.
        EvaluationError: if it is of another size than the first one.
    """
    photo = read_photo(files.photo)
    height, width = photo.shape[:2]
    if size is not None and size != (height, width):
        raise EvaluationError(
            f"expected {size[1]} x {size[0]} pixels as in the sequence's first frame, got {width} x {height}"
        )

    def frame(mask: Path | None, digest: str) -> Frame:
        return Frame(
            split="val",
            id=files.id,
            photo=files.photo,
            height=height,
            width=width,
            digest=photo_digest(photo),
            sequence=files.sequence,
            mask=mask,
            coding=coding,
            mask_digest=digest,
        )

    if files.mask is None:
        return _Found(frame(None, ""))
    try:
        values = read_values(files.mask)
        if values.shape != (height, width):
            raise EvaluationError(
                f"expected a mask of the frame's {width} x {height} pixels, got one of {values.shape[1]} x "
                f"{values.shape[0]} ({files.mask})"
            )
        labels, others = coding.labels(values, str(files.mask))
    except (EvaluationError, OSError) as error:
        return _Found(frame(None, ""), reason=str(error))
    # int32 in little endian: the same on every machine.
    return _Found(frame(files.mask, photo_digest(labels.astype("<i4"))), others)
