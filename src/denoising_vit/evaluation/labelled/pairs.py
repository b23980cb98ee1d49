"""Which mask belongs to which photo: by name in two folders, or by a list of names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from denoising_vit.data import Skipped
from denoising_vit.data.folders import files_below, image_names
from denoising_vit.data.storage import Storage
from denoising_vit.errors import EvaluationError, PhotoError
from denoising_vit.evaluation.labelled.classes import read_text


@dataclass(frozen=True)
class Pair:
    """A photo and its mask, not yet read.

    Attributes:
        id: path of the photo below its folder, with ``/`` between its parts.
        photo: the file of the photo.
        mask: the file of the mask.
    """

    id: str
    photo: Path
    mask: Path


def pairs_in_folders(photos: Path, masks: Path) -> tuple[list[Pair], list[Skipped]]:
    """Photos and masks at the same place below their folders, with the same name up to the ending; sorted by id.

    Returns:
        Pairs; and photos without a mask, masks without a photo, and second files of one name.

    Raises:
        EvaluationError: if a folder cannot be read.
    """
    photo_of, photo_skips = _by_stem(photos, "photo")
    mask_of, mask_skips = _by_stem(masks, "mask")
    pairs = [
        Pair(name, photos / name, masks / mask_of[stem])
        for stem, name in sorted(photo_of.items(), key=lambda entry: entry[1])
        if stem in mask_of
    ]
    lonely = [
        Skipped(name, f"a photo without a mask; expected {masks / stem}.png, or with another ending")
        for stem, name in photo_of.items()
        if stem not in mask_of
    ] + [
        Skipped(name, f"a mask without a photo; expected {photos / stem}.jpg, or with another ending")
        for stem, name in mask_of.items()
        if stem not in photo_of
    ]
    return pairs, sorted([*photo_skips, *mask_skips, *lonely], key=lambda entry: entry.item)


def _by_stem(folder: Path, kind: str) -> tuple[dict[str, str], list[Skipped]]:
    """Image files below a folder by their path without its ending; the first of several that differ only there."""
    try:
        names, skipped = files_below(Storage(), str(folder))
    except PhotoError as error:
        raise EvaluationError(str(error)) from error
    found: dict[str, str] = {}
    for name in image_names(names, str(folder)):
        path = PurePosixPath(name)
        stem = path.with_suffix("").as_posix()
        if stem in found:
            skipped.append(Skipped(name, f"a second {kind} of the name {stem}; {found[stem]} is taken"))
        else:
            found[stem] = name
    return found, skipped


def pairs_in_list(names: Path, photos: Path, masks: Path) -> tuple[list[Pair], list[Skipped]]:
    """Photos (.jpg) and masks (.png) of a text list, one name without ending a line; in its order.

    Whether the files are there is found out when they are read.

    Returns:
        Pairs; and lines that repeat an earlier one.

    Raises:
        EvaluationError: if the list cannot be read, or names nothing.
    """
    lines = [line.strip() for line in read_text(names).split("\n")]
    pairs: dict[str, Pair] = {}
    skipped = []
    for line in filter(None, lines):
        pair = Pair(f"{line}.jpg", photos / f"{line}.jpg", masks / f"{line}.png")
        if pair.id in pairs:
            skipped.append(Skipped(pair.id, f"named a second time in {names}"))
        else:
            pairs[pair.id] = pair
    if not pairs:
        raise EvaluationError(f"{names}: expected names of photos, one a line, found none")
    return list(pairs.values()), skipped
