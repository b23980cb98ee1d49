"""Videos with object masks in the layout of DAVIS."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from denoising_vit.data import Skipped
from denoising_vit.data.photos import photo_digest, read_photo
from denoising_vit.errors import EvaluationError, PhotoError
from denoising_vit.evaluation.data import EvaluationData, EvaluationImage, EvaluationSet, described
from denoising_vit.evaluation.layouts import (
    Layout,
    Unread,
    at_most,
    by_stem,
    check_same_size,
    find_layout,
    folders_in,
    images_in,
    inspect_all,
    listed,
    read_sequences,
    readable,
    require_usable,
)
from denoising_vit.evaluation.masks import Objects, mask_values

#: Folders of frames and masks, with one folder per resolution and sequence.
_FRAMES, _MASKS = "JPEGImages", "Annotations"

#: Resolutions in order of preference.
_RESOLUTIONS = ("480p", "Full-Resolution", "1080p")


@dataclass(frozen=True)
class Frame(EvaluationImage):
    """One frame of a sequence.

    Attributes:
        sequence: name of the sequence.
        mask: file of the mask, which has the frame's size; None if there is no usable mask.
        coding: meaning of the values in the sequence's masks.
        mask_digest: digest of the labels; empty without a mask.
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
        """Digest of the sequence, its objects and the labels."""
        return f"{self.sequence}\0{self.objects}\0{self.mask_digest}"

    def labels(self) -> Tensor:
        """Numbers of objects (H, W) int64, 0 elsewhere, NO_LABEL for pixels without a label.

        Raises:
            EvaluationError: if there is no mask, or it can no longer be read.
        """
        if self.mask is None:
            raise EvaluationError(f"{self.id}: expected a frame with a mask, got one without")
        labels, _ = self.coding.labels(mask_values(self.mask), str(self.mask))
        return torch.from_numpy(labels)


@dataclass(frozen=True)
class ClipData(EvaluationData[EvaluationSet[Frame]]):
    """Videos in one split, sequence by sequence with frames in order."""

    @property
    def clips(self) -> list[tuple[Frame, ...]]:
        """Frames of each sequence. The first frame and at least one later frame have a mask."""
        return [tuple(frames) for _, frames in itertools.groupby(self.val.images, lambda frame: frame.sequence)]


def open_clips(path: str | Path, *, progress: Callable[[], None] | None = None, sequences: int = 0) -> ClipData:
    """Open videos in the layout of DAVIS and read every frame and mask once.

    Frames are in ``JPEGImages/<resolution>/<sequence>``, masks with the same names in
    ``Annotations/<resolution>/<sequence>``: 0 and 255 as in DAVIS 2016, or object numbers as in DAVIS 2017. If there
    are several resolutions, 480p is used. Sequences are read from ``ImageSets/2017/val.txt``, or else from the list of
    the resolution, or else from that of 2016; without a list, all sequences are used.

    Only the first frame and one later frame need a mask; labels are propagated through frames without masks.

    Raises:
        EvaluationError: if the layout is unknown, or no sequence is usable.
    """
    root = find_layout(Path(path), [DAVIS])[1]
    frames: list[Frame] = []
    with readable(root):
        resolution = _resolution(root)
        names, source, skipped = _sequences(root, resolution)
        names = at_most(names, sequences, "sequences")
        for name in names:
            photos, masks = (root / kind / resolution / name for kind in (_FRAMES, _MASKS))
            files, unpaired = _files(name, photos, masks)
            skipped += unpaired
            try:
                found, reasons = _read_sequence(masks, files, progress)
            except (EvaluationError, PhotoError, OSError) as error:
                skipped.append(Skipped(name, str(error)))
            else:
                frames += found
                skipped += reasons
    require_usable(frames, "sequences of frames with masks", len(names), skipped, root)
    note, name = "no list of sequences (ImageSets/2017/val.txt): all are evaluated", root.resolve().name
    if source:
        kinds = {frame.coding.binary for frame in frames}
        note, name = None, "DAVIS" if len(kinds) > 1 else "DAVIS 2016" if kinds.pop() else "DAVIS 2017"
    return ClipData(name, DAVIS.name, (EvaluationSet("val", tuple(frames), skipped=tuple(skipped)),), note)


#: Videos, for label propagation.
DAVIS = Layout("DAVIS", (_FRAMES, _MASKS), open_clips, roots=(".", "DAVIS"), name="davis")


def _resolution(root: Path) -> str:
    masks = folders_in(root / _MASKS)
    both = [name for name in folders_in(root / _FRAMES) if name in masks]
    known = [name for name in _RESOLUTIONS if name in both]
    if known or len(both) == 1:
        return (known or both)[0]
    raise EvaluationError(
        f"{root}: expected one resolution folder, such as 480p, in both {_FRAMES} and {_MASKS}; found "
        f"{listed(root / _FRAMES)} and {listed(root / _MASKS)}"
    )


def _sequences(root: Path, resolution: str) -> tuple[list[str], Path | None, list[Skipped]]:
    """Names of sequences, the list file, and listed sequences without a folder."""
    folder = root / _FRAMES / resolution
    there = folders_in(folder)
    lists = (root / "ImageSets" / kind / "val.txt" for kind in ("2017", resolution, "2016"))
    source = next((path for path in lists if path.is_file()), None)
    if source is None:
        return there, None, []
    wanted = read_sequences(source)
    missing = [name for name in wanted if name not in there]
    skipped = [Skipped(name, f"listed in {source}, but there is no folder {folder / name}") for name in missing]
    return [name for name in wanted if name in there], source, skipped


@dataclass(frozen=True)
class _Files(Unread):
    """A frame, and its mask if it has one."""

    sequence: str
    mask: Path | None


def _files(sequence: str, photos: Path, masks: Path) -> tuple[list[_Files], list[Skipped]]:
    """Frames in order, each with its mask; and skipped files: duplicate names, and masks without a frame."""
    (photo_of, more), (mask_of, others) = (by_stem(images_in(folder), "file") for folder in (photos, masks))
    skipped = [*more, *others]
    skipped += [
        Skipped(name, f"a mask without a frame; expected {photos / stem}.jpg")
        for stem, name in mask_of.items()
        if stem not in photo_of
    ]
    files = [
        _Files(f"{sequence}/{name}", photos / name, sequence, masks / mask_of[stem] if stem in mask_of else None)
        for stem, name in photo_of.items()
    ]
    return files, [replace(entry, item=f"{sequence}/{entry.item}") for entry in skipped]


class _Read(NamedTuple):
    """A frame; object numbers in its mask that the first mask lacks; and the reason if its mask is unusable."""

    frame: Frame
    others: tuple[int, ...] = ()
    reason: str | None = None


def _read_sequence(
    masks: Path, files: list[_Files], progress: Callable[[], None] | None
) -> tuple[list[Frame], list[Skipped]]:
    """The usable frames of a sequence, if there is a later mask to evaluate."""
    alone = "a sequence of one frame; expected at least two"
    if len(files) < 2:
        raise EvaluationError(alone if files else "a sequence without frames")
    start, *later = files
    if start.mask is None:
        raise EvaluationError(f"the first frame has no mask; expected {masks / start.photo.stem}.png")
    coding = Objects.first(mask_values(start.mask), str(start.mask))
    first = _read_frame(start, coding)
    if first.reason:
        raise EvaluationError(first.reason)
    size = first.frame.height, first.frame.width
    if progress is not None:
        progress()
    read, skipped = inspect_all(lambda each: _read_frame(each, coding, size), later, progress)
    skipped += [
        Skipped(one.frame.id, f"propagated through, but not evaluated: {one.reason}") for one in read if one.reason
    ]
    skipped.sort(key=lambda entry: entry.item)
    frames = [first.frame, *(one.frame for one in read)]
    reason = f" ({skipped[0].item}: {skipped[0].reason})" if skipped else ""
    if len(frames) < 2:
        raise EvaluationError(f"{alone}{reason}")
    if all(frame.mask is None for frame in frames[1:]):
        raise EvaluationError(f"no frame after the first has a mask: nothing to evaluate{reason}")
    return frames, _remarks(files, {number for one in read for number in one.others}) + skipped


def _remarks(files: Sequence[_Files], others: set[int]) -> list[Skipped]:
    """One entry per sequence, not per frame: in some videos only every fifth frame has a mask."""
    bare = [file.photo.name for file in files if file.mask is None]
    remarks = []
    if bare:
        remarks.append(
            f"{len(bare)} of {len(files)} frames have no mask ({bare[0]} first): propagated through, but not evaluated"
        )
    if others:
        numbers = f"object{'s' if len(others) > 1 else ''} {', '.join(map(str, sorted(others)))}"
        remarks.append(f"not in the first mask, so ignored: {numbers}")
    return [Skipped(files[0].sequence, reason) for reason in remarks]


def _read_frame(files: _Files, coding: Objects, size: tuple[int, int] | None = None) -> _Read:
    """Read a frame and its mask; the frame must have the given size (H, W), if any."""
    photo = read_photo(files.photo)
    height, width = photo.shape[:2]
    if size is not None and size != (height, width):
        raise EvaluationError(
            f"expected {size[1]} x {size[0]} pixels as in the sequence's first frame, got {width} x {height}"
        )

    shown = described("val", files.id, files.photo, photo)
    bare = Frame(**shown, sequence=files.sequence, mask=None, coding=coding, mask_digest="")
    if files.mask is None:
        return _Read(bare)
    try:
        values = mask_values(files.mask)
        check_same_size(photo.shape, values.shape, files.mask)
        labels, others = coding.labels(values, str(files.mask))
    except (EvaluationError, OSError) as error:
        return _Read(bare, reason=str(error))
    # Little-endian int32: the same on every machine.
    return _Read(replace(bare, mask=files.mask, mask_digest=photo_digest(labels.astype("<i4"))), others)
