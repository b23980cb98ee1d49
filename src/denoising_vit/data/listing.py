"""Files from folders, globs and braces, local or at an fsspec address."""

from __future__ import annotations

import glob
import itertools
import logging
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from denoising_vit.data.dataset import Skipped
from denoising_vit.data.photos import IMAGE_SUFFIXES, is_panel
from denoising_vit.data.storage import Storage, reason_of, reporting, scheme_of, suffix_of
from denoising_vit.errors import PhotoError

_LOG = logging.getLogger(__name__)

#: Number of suffixes of ignored files to log.
_MOST_NAMED = 5


def by_number(name: str) -> tuple[list[str | int], str]:
    """Sort key that puts frame 9 before frame 10, with or without leading zeros."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name


def files_below(storage: Storage, folder: str) -> tuple[list[str], list[Skipped]]:
    """Files at any depth, as sorted paths relative to the folder, without hidden files; and skipped entries.

    Links to folders are followed (class folders of subsets are often links), except links to a parent folder.

    Raises:
        PhotoError: if the folder itself cannot be read.
    """
    with reporting(f"{folder}: the folder cannot be listed"):
        if not scheme_of(folder):
            return _local_files_below(folder)
        filesystem = storage.filesystem(folder)
        filesystem.invalidate_cache()
        names = [relative_to(storage, name, folder) for name in filesystem.find(folder)]
        return sorted(name for name in names if name and not is_hidden(name)), []


def image_names(names: Iterable[str], place: str) -> list[str]:
    """Paths or addresses with image suffixes; the number of other files in ``place`` is logged."""
    names = list(names)
    images = [name for name in names if suffix_of(name) in IMAGE_SUFFIXES]
    if len(images) < len(names):
        others = Counter(suffix_of(name) or "no extension" for name in names if suffix_of(name) not in IMAGE_SUFFIXES)
        counts = ", ".join(f"{count} {ending}" for ending, count in others.most_common(_MOST_NAMED))
        more = ", ..." if len(others) > _MOST_NAMED else ""
        files = f"{others.total()} file{'s' if others.total() > 1 else ''}"
        _LOG.info("%s: %s ignored, without an image extension (%s%s)", place, files, counts, more)
    return images


def _local_files_below(root: str) -> tuple[list[str], list[Skipped]]:
    files: list[str] = []
    skipped: list[Skipped] = []
    waiting = [("", frozenset({Path(root).resolve()}))]  # folders, each with the set of itself and its parents
    while waiting:
        below, around = waiting.pop()
        try:
            entries = list(os.scandir(Path(root) / below))
        except OSError as error:
            if not below:
                raise
            skipped.append(Skipped(below, f"unreadable folder ({reason_of(error)})"))
            continue
        for entry in entries:
            name = posixpath.join(below, entry.name)
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    target = Path(entry.path).resolve()
                    if target in around:
                        skipped.append(Skipped(name, f"a link to its parent folder {target}"))
                    else:
                        waiting.append((name, around | {target}))
                elif entry.is_file():
                    files.append(name)
                elif entry.is_symlink():
                    skipped.append(Skipped(name, "a broken link"))
            except OSError as error:  # circular links
                skipped.append(Skipped(name, reason_of(error)))
    return sorted(files), sorted(skipped, key=lambda entry: entry.item)


def relative_to(storage: Storage, address: str, folder: str) -> str:
    """The path of an address relative to a folder, with ``/`` as separator."""
    if not scheme_of(folder):
        return Path(address).relative_to(folder).as_posix()
    filesystem = storage.filesystem(folder)
    above = filesystem._strip_protocol(folder).rstrip("/")
    return filesystem._strip_protocol(address).removeprefix(above).lstrip("/")


def is_hidden(name: str) -> bool:
    """True if any part of a relative path starts with a dot."""
    return any(part.startswith(".") for part in name.split("/"))


#: Maximum number of names from one pattern with braces; more are assumed to be a typo.
_MAX_NAMES = 1_000_000


def is_pattern(name: str) -> bool:
    """True if a name contains a glob or braces; a file may still have that name."""
    return glob.has_magic(name) or "{" in name


def folder_of_pattern(pattern: str) -> str:
    """The folder before the first variable part of a pattern."""
    fixed = re.split(r"[*?\[{]", pattern, maxsplit=1)[0]
    return fixed[: fixed.rfind("/") + 1]


def matches(storage: Storage, pattern: str) -> list[tuple[str, bool]]:
    """Matches of a glob (``**`` allowed), sorted by address, each with True for a folder.

    Raises:
        PhotoError: if the location cannot be searched.
    """
    if not scheme_of(pattern):
        found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207, may be absolute
        return [(match, Path(match).is_dir()) for match in found]
    with reporting(f"{pattern}: the location cannot be searched"):
        filesystem = storage.filesystem(pattern)
        filesystem.invalidate_cache()
        found = filesystem.glob(pattern, detail=True)
    scheme = scheme_of(pattern)
    return [(f"{scheme}://{name.lstrip('/')}", found[name]["type"] == "directory") for name in sorted(found)]


def expand_braces(pattern: str) -> list[str]:
    """Expand ``a-{08..10}`` to ``a-08``, ``a-09``, ``a-10``, and ``{a,b}`` to ``a``, ``b``; several are combined.

    Raises:
        PhotoError: if braces have neither form, or expand to too many names.
    """
    names = list(itertools.islice(_expanded(pattern, pattern), _MAX_NAMES + 1))
    if len(names) > _MAX_NAMES:
        raise PhotoError(f"{pattern}: the braces expand to more than {_MAX_NAMES:,} names")
    if any(brace in names[0] for brace in "{}"):
        raise PhotoError(f"{pattern}: expected matching braces, as in shards-{{0000..0009}}.tar")
    return list(dict.fromkeys(names))


def _expanded(name: str, pattern: str) -> Iterator[str]:
    """Expand the first innermost braces, then the others."""
    opened = re.search(r"\{([^{}]*)\}", name)
    if not opened:
        yield name
        return
    for part in _alternatives(opened[1], pattern):
        yield from _expanded(name[: opened.start()] + part + name[opened.end() :], pattern)


def _alternatives(inside: str, pattern: str) -> Iterable[str]:
    if numbers := re.fullmatch(r"([0-9]+)\.\.([0-9]+)", inside):
        first, last = int(numbers[1]), int(numbers[2])
        padded = any(len(text) > 1 and text.startswith("0") for text in numbers.groups())
        if abs(last - first) >= _MAX_NAMES:
            raise PhotoError(f"{pattern}: {{{inside}}} expands to more than {_MAX_NAMES:,} names")
        width = max(map(len, numbers.groups())) if padded else 0
        return (f"{number:0{width}d}" for number in range(min(first, last), max(first, last) + 1))
    if "," in inside:
        return inside.split(",")
    raise PhotoError(f"{pattern}: expected braces like {{0000..0009}} or {{train,val}}, found {{{inside}}}")


def find_photos(inputs: Sequence[str | Path]) -> tuple[list[Path], list[Skipped]]:
    """Expand files, folders (searched recursively for images) and globs (``**`` allowed).

    Args:
        inputs: paths and patterns.

    Returns:
        Unique files in the order of the inputs, those of folders and globs sorted by name; and skipped inputs and
        folder entries. A file that is given explicitly may have any suffix.
    """
    found: dict[Path, Path] = {}
    skipped: list[Skipped] = []
    for item in map(str, inputs):
        try:
            files, reason = _expand(item, skipped)
        except (OSError, PhotoError) as error:  # the name is too long for the file system, the folder is not readable
            files, reason = [], reason_of(error)
        for file in files:
            found.setdefault(file.resolve(), file)
        if not files:
            skipped.append(Skipped(item, reason))
    return list(found.values()), skipped


def _expand(item: str, skipped: list[Skipped]) -> tuple[list[Path], str]:
    """The files of an input, or the reason why there are none; extends ``skipped``."""
    path = Path(item)
    if not item.strip():
        return [], "an empty name"
    if path.is_dir():
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        return _images_below(path, skipped), f"no image files in this folder (looked for {suffixes})"
    if path.exists():
        return [path], ""
    if not glob.has_magic(item):
        return [], "no such file or folder"
    matches = sorted(Path(match) for match in glob.glob(item, recursive=True))  # noqa: PTH207, may be absolute
    files = [file for match in matches for file in (_images_below(match, skipped) if match.is_dir() else [match])]
    return files, "the pattern matches no files"


def _images_below(folder: Path, skipped: list[Skipped]) -> list[Path]:
    """Image files at any depth, without hidden files and pictures drawn by this package."""
    names, others = files_below(Storage(), str(folder))
    skipped += (replace(entry, item=str(folder / entry.item)) for entry in others)
    files = (folder / name for name in image_names(names, str(folder)))
    return sorted(file for file in files if not is_panel(file))
