"""Folder layouts of evaluation data, shared by all tasks.

A task lists its layouts as :class:`Layout` records, and :func:`find_layout` returns the one that a folder matches.
Photos are paired with masks or depth maps by :func:`pairs_in_folders` or :func:`pairs_in_list`, then read once by
:func:`inspect_all`. Unusable entries are returned as ``Skipped`` with a reason; unreadable files and folders raise
EvaluationError.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Generic, NamedTuple, TypeVar

from denoising_vit.data import Skipped, spread
from denoising_vit.data.listing import by_number, files_below, image_names
from denoising_vit.data.photos import IMAGE_SUFFIXES
from denoising_vit.data.storage import Storage
from denoising_vit.errors import EvaluationError, PhotoError

#: Decoding releases the GIL. More threads gain little and keep more photos in memory.
_THREADS = 4

#: Number of names in a folder that a message lists.
_SHOWN = 8

#: Type of the function that opens a layout.
Opener = TypeVar("Opener", covariant=True)


@dataclass(frozen=True)
class Layout(Generic[Opener]):
    """Files and folders that identify the layout of a data set.

    Attributes:
        title: name for messages.
        required: paths that must exist below a root. A path with an extension is a file, any other a folder; ``*`` is a
            wildcard, and ``|`` separates alternatives.
        open: opens a folder with this layout.
        roots: folders below the given one in which the layout may start.
        name: name in results.
    """

    title: str
    required: tuple[str, ...]
    open: Opener
    roots: tuple[str, ...] = (".",)
    name: str = ""


def find_layout(path: Path, layouts: Sequence[Layout[Opener]]) -> tuple[Layout[Opener], Path]:
    """Return the first layout that a folder matches, and the root where it starts.

    Raises:
        EvaluationError: if the path is not a folder, matches no layout, or matches one at several roots.
    """
    expected = ", or ".join(f"{layout.title} ({', '.join(layout.required).replace('|', ' or ')})" for layout in layouts)
    partial = []
    with readable(path):
        if not path.is_dir():
            what = "a file" if path.exists() else "nothing"
            raise EvaluationError(f"{path}: expected a data set folder, found {what}")
        for layout in layouts:
            roots = []
            for root in (path / below for below in layout.roots):
                missing = [_described(root, entry) for entry in layout.required if not _exists(root, entry)]
                if not missing:
                    roots.append(root)
                elif len(missing) < len(layout.required):
                    partial.append(f"{root} looks like {layout.title}, but lacks {', '.join(missing)}")
            if len(roots) > 1:
                raise EvaluationError(f"{path} has {' and '.join(map(str, roots))}; give one of them")
            if roots:
                return layout, roots[0]
        if partial:
            raise EvaluationError(f"{partial[0]}; expected {expected}")
        raise EvaluationError(f"{path}: expected {expected}; found {listed(path)}")


def _exists(root: Path, entry: str) -> bool:
    if "|" in entry:
        return any(_exists(root, one) for one in entry.split("|"))
    if "*" in entry:
        return any(root.glob(entry))
    path = root / entry
    return path.is_file() if path.suffix else path.is_dir()


def _described(root: Path, entry: str) -> str:
    entry = entry.replace("|", " or ")
    return f"{entry} (a file, expected a folder)" if (root / entry).is_file() else entry


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Convert OSErrors of a file or folder (no permission, name too long) to EvaluationError."""
    try:
        yield
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror or error})") from error


def visible(folder: Path) -> list[Path]:
    """Entries of a folder that are not hidden; empty if it does not exist."""
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")] if folder.is_dir() else []


def folders_in(folder: Path) -> list[str]:
    """Names of the subfolders of a folder, sorted; empty if it does not exist."""
    return sorted(entry.name for entry in visible(folder) if entry.is_dir())


def images_in(folder: Path) -> list[str]:
    """Names of the images in a folder, in natural order; empty if it does not exist."""
    names = image_names((entry.name for entry in visible(folder) if entry.is_file()), str(folder))
    return sorted(names, key=by_number)


def listed(folder: Path) -> str:
    """Describe the entries of a folder for a message."""
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in visible(folder))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN]) or 'an empty folder'}{more}"


# --- lists ---


def read_text(path: Path) -> str:
    """Read a text file."""
    with readable(path):
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise EvaluationError(f"{path}: expected UTF-8 text, found other bytes ({error})") from error


def read_lines(path: Path) -> list[str]:
    """Lines of a text file, stripped, without empty ones."""
    return [line for line in map(str.strip, read_text(path).split("\n")) if line]


def read_names(path: Path) -> tuple[list[str], list[Skipped]]:
    """Read the names in a text file, one per line; duplicates are skipped."""
    lines = read_lines(path)
    if not lines:
        raise EvaluationError(f"{path}: expected names, one per line, found none")
    names = list(dict.fromkeys(lines))
    return names, [Skipped(name, f"listed twice in {path}") for name in names if lines.count(name) > 1]


def read_sequences(path: Path) -> list[str]:
    """Read a DAVIS list: names of sequences (2017), or the files of each frame and its mask (2016)."""
    entries = [PurePosixPath(line.split()[0]) for line in read_names(path)[0]]
    folders = (entry.parent if entry.suffix.lower() in IMAGE_SUFFIXES else entry for entry in entries)
    return list(dict.fromkeys(folder.name for folder in folders))


Entry = TypeVar("Entry")


def at_most(entries: Sequence[Entry], count: int, what: str = "images") -> list[Entry]:
    """At most ``count`` entries, spread evenly over all; 0 returns all."""
    if count < 0:
        raise EvaluationError(f"expected a number of {what} of at least 1, or 0 for all, got {count}")
    return [entries[index] for index in spread(len(entries), count)]


# --- photos with masks ---


@dataclass(frozen=True)
class Unread:
    """A photo that has not been read yet; ``id`` is its path below its folder, with ``/`` as separator."""

    id: str
    photo: Path


@dataclass(frozen=True)
class Pair(Unread):
    """A photo and the file of its mask or depth map."""

    mask: Path


class Pairs(NamedTuple):
    """Pairs not yet read, and skipped entries."""

    pairs: list[Pair]
    skipped: list[Skipped]


def pairs_in_folders(photos: Path, masks: Path, what: str = "mask") -> Pairs:
    """Pair photos and masks by their path below each folder, without the extension; sorted by id.

    Photos without a mask, masks without a photo, and duplicate names are skipped.
    """
    photo_of, skipped_photos = _by_stem(photos, "photo")
    mask_of, skipped_masks = _by_stem(masks, what)
    pairs = [
        Pair(name, photos / name, masks / mask_of[stem])
        for stem, name in sorted(photo_of.items(), key=lambda entry: entry[1])
        if stem in mask_of
    ]
    unpaired = [
        Skipped(name, f"a photo without a {what}; expected {masks / stem}.png, or with another extension")
        for stem, name in photo_of.items()
        if stem not in mask_of
    ] + [
        Skipped(name, f"a {what} without a photo; expected {photos / stem}.jpg, or with another extension")
        for stem, name in mask_of.items()
        if stem not in photo_of
    ]
    return Pairs(pairs, sorted([*skipped_photos, *skipped_masks, *unpaired], key=lambda entry: entry.item))


def _by_stem(folder: Path, what: str) -> tuple[dict[str, str], list[Skipped]]:
    """Image files below a folder by path without extension, the first of duplicates; and skipped entries."""
    try:
        names, skipped = files_below(Storage(), str(folder))
    except PhotoError as error:
        raise EvaluationError(str(error)) from error
    found, repeated = by_stem(image_names(names, str(folder)), what)
    return found, [*skipped, *repeated]


def by_stem(names: Iterable[str], what: str) -> tuple[dict[str, str], list[Skipped]]:
    """File names by path without extension, the first of duplicates; and the other duplicates, with reasons."""
    found: dict[str, str] = {}
    skipped = []
    for name in names:
        stem = PurePosixPath(name).with_suffix("").as_posix()
        if found.setdefault(stem, name) != name:
            skipped.append(Skipped(name, f"duplicate {what} name {stem}; {found[stem]} is used"))
    return found, skipped


def pairs_in_list(names: Path, photos: Path, masks: Path) -> Pairs:
    """Pair photos (.jpg) and masks (.png) by a list of names without extensions, in the list's order."""
    stems, repeated = read_names(names)
    pairs = [Pair(f"{stem}.jpg", photos / f"{stem}.jpg", masks / f"{stem}.png") for stem in stems]
    return Pairs(pairs, [Skipped(f"{entry.item}.jpg", entry.reason) for entry in repeated])


def check_same_size(photo: tuple[int, ...], mask: tuple[int, ...], path: Path, what: str = "mask") -> None:
    """Raise EvaluationError if photo and mask (H, W, ...) differ in size; ``path`` is the file of the mask."""
    if photo[:2] != mask[:2]:
        raise EvaluationError(
            f"expected photo and {what} of the same size, got a photo of {photo[1]} x {photo[0]} pixels and a {what} "
            f"of {mask[1]} x {mask[0]} ({path})"
        )


# --- reading ---


Item = TypeVar("Item", bound=Unread)
Found = TypeVar("Found")


def inspect_all(
    inspect_one: Callable[[Item], Found | Skipped], items: Sequence[Item], progress: Callable[[], None] | None
) -> tuple[list[Found], list[Skipped]]:
    """Read photos in a few threads, in order.

    Photos that raise PhotoError, EvaluationError or OSError are skipped. Returns the results of the usable photos, and
    the skipped ones with the errors as reasons.
    """

    def inspected(item: Item) -> Found | Skipped:
        try:
            return inspect_one(item)
        except PhotoError as error:
            return Skipped(item.id, str(error).removeprefix(f"{item.photo}: "))  # the id already names the photo
        except (EvaluationError, OSError) as error:
            return Skipped(item.id, str(error))

    usable: list[Found] = []
    failed: list[Skipped] = []
    pool = ThreadPoolExecutor(_THREADS, "inspect")
    try:
        for found in pool.map(inspected, items):
            if isinstance(found, Skipped):
                failed.append(found)
            else:
                usable.append(found)
            if progress is not None:
                progress()
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt must not wait for the remaining photos
    return usable, failed


def require_usable(
    usable: Sequence[object], expected: str, count: int, skipped: Sequence[Skipped], path: Path | None = None
) -> None:
    """Raise EvaluationError with the first reason if none of ``count`` entries of a folder is usable."""
    if not usable:
        first = f"; first reason: {skipped[0].item}: {skipped[0].reason}" if skipped else ""
        place = f"{path}: " if path else ""
        raise EvaluationError(f"{place}expected {expected}, but none of {count} is usable{first}")
