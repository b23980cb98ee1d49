"""Data sets from folders, images, text lists, tar shards, and patterns of them."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from denoising_vit.data.dataset import Dataset, Item, Skipped
from denoising_vit.data.listing import (
    expand_braces,
    files_below,
    folder_of_pattern,
    image_names,
    is_hidden,
    is_pattern,
    matches,
    relative_to,
)
from denoising_vit.data.photos import IMAGE_SUFFIXES, is_panel, read_photo_bytes
from denoising_vit.data.shards import index_shards, is_shard
from denoising_vit.data.storage import (
    Storage,
    can_list,
    local_or_remote,
    path_of,
    reason_of,
    reporting,
    scheme_of,
    suffix_of,
)
from denoising_vit.errors import PhotoError

_EXPECTED = "expected a folder of images, an image file, a text list of images (.txt) or uncompressed tar shards (.tar)"

#: Number of first bytes that identify this package's pictures among remote PNG files, and of files to check at once.
_START_BYTES, _AT_ONCE = 1024, 4096


def open_dataset(source: str | Path) -> Dataset:
    """Find the images of a source, without reading them.

    Folders are searched recursively for images or, if there are none, for tar shards. Hidden files and pictures drawn
    by this package are ignored. Order and ids do not depend on the location of the source.

    Args:
        source: a path or an fsspec address (``s3://``, ``gs://``, ``https://``, ...) of a folder, an image, a text list
            or a tar shard, or a pattern of images or shards: a glob, or braces like ``shards-{0000..0009}.tar``.
            ``https://`` servers cannot list files, so give files, lists or braces.

    Raises:
        PhotoError: if the source does not exist, has no images, or cannot be reached.
    """
    name = str(source)
    if not name.strip():
        raise PhotoError(f"{_EXPECTED}, got an empty name")
    if isinstance(source, Path) and (collapsed := re.match(r"([A-Za-z0-9]{2,}):/", name)):
        raise PhotoError(f"{name}: give {collapsed[1]}:// addresses as str, because a Path removes one of the slashes")
    storage = Storage()
    address = local_or_remote(name)
    if not scheme_of(address):
        address = str(Path(address).absolute())  # workers may run in another directory
    items, skipped = _find(storage, address)
    items, doubtful = _well_named(items)
    skipped = [*skipped, *doubtful]
    if not items:
        reasons = "; ".join(f"{entry.item}: {entry.reason}" for entry in skipped[:3])
        more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        raise PhotoError(f"{name}: {_EXPECTED}, found none{f' ({reasons}{more})' if reasons else ''}")
    return Dataset(name, items, skipped)


def _find(storage: Storage, address: str) -> tuple[list[Item], list[Skipped]]:
    """Images sorted by id, or in the order of a list; and skipped entries."""
    if not can_list(address):
        return _find_without_listing(storage, address)
    kind = storage.kind(address)
    if kind == "folder":
        names, skipped = files_below(storage, address)
        files = [(name, posixpath.join(address, name)) for name in names]
        items, others = _select(storage, files, address)
        return items, skipped + others
    if kind == "file":
        return _from_file(storage, address)
    if is_pattern(address):
        return _from_pattern(storage, address)
    raise PhotoError(f"{address}: no such file or folder, {_EXPECTED}")


def _find_without_listing(storage: Storage, address: str) -> tuple[list[Item], list[Skipped]]:
    if "{" in address:
        return _from_pattern(storage, address)
    named = suffix_of(address) == ".txt" or suffix_of(address) in IMAGE_SUFFIXES or is_shard(address)
    if not named or "*" in path_of(address):
        raise PhotoError(
            f"{address}: {scheme_of(address)}:// servers cannot list files; expected a text list of images (.txt), an "
            "image, or tar shards (.tar), given by name or by braces like shards-{0000..0009}.tar"
        )
    return _from_file(storage, address)


def _from_file(storage: Storage, address: str) -> tuple[list[Item], list[Skipped]]:
    """The images of one file; an image may have any suffix, and may be a picture drawn by this package."""
    name = posixpath.basename(path_of(address)) if scheme_of(address) else Path(address).name
    if is_shard(address):
        return index_shards(storage, [(name, address)])
    if suffix_of(address) == ".txt":
        return read_list(storage, address)
    if suffix_of(address) not in IMAGE_SUFFIXES:
        try:
            read_photo_bytes(storage.read(address), name)
        except Exception as error:  # every service has its own exceptions
            raise PhotoError(f"{address}: {_EXPECTED}, got a file of another type") from error
    return [Item(name, address)], []


def _from_pattern(storage: Storage, pattern: str) -> tuple[list[Item], list[Skipped]]:
    """The images of a pattern, with ids relative to its fixed folder."""
    files: list[tuple[str, str]] = []
    skipped: list[Skipped] = []
    above = folder_of_pattern(pattern)

    def take(address: str) -> None:
        files.append((relative_to(storage, path_of(address), above), address))

    for name in expand_braces(pattern):
        if not can_list(name) or (is_shard(name) and not is_pattern(name)):
            take(name)  # a missing file is reported on indexing
            continue
        kind = storage.kind(name)
        found = [(name, kind == "folder")] if kind else matches(storage, name) if is_pattern(name) else []
        if not found:
            missing = "the pattern matches no files" if is_pattern(name) else "no such file or folder"
            skipped.append(Skipped(name, missing))
        for address, is_folder in found:
            if not is_folder:
                take(address)
                continue
            inner, others = files_below(storage, address)
            skipped += others
            for below in inner:
                take(posixpath.join(address, below))
    items, others = _select(storage, list(dict.fromkeys(files)), pattern)
    return items, skipped + others


def _select(storage: Storage, files: Sequence[tuple[str, str]], place: str) -> tuple[list[Item], list[Skipped]]:
    """The images among files (name, address); if there are none, those in tar shards among them."""
    shown = sorted((name, address) for name, address in files if not is_hidden(name))
    shards = [(name, address) for name, address in shown if is_shard(address)]
    found = set(image_names((address for _, address in shown if not is_shard(address)), place))
    images = [Item(name, address) for name, address in shown if address in found]
    items = _without_panels(storage, images)
    if not items:
        return index_shards(storage, shards)
    reason = "a tar archive next to images, possibly of the same images; open it as a separate data set"
    return items, [Skipped(name, reason) for name, _ in shards]


def _without_panels(storage: Storage, images: list[Item]) -> list[Item]:
    drawn = {item.id for item in images if not scheme_of(item.url) and is_panel(Path(item.url))}
    remote = [item for item in images if scheme_of(item.url) and can_list(item.url) and suffix_of(item.url) == ".png"]
    for first in range(0, len(remote), _AT_ONCE):
        some = remote[first : first + _AT_ONCE]
        starts = storage.filesystem(some[0].url).cat_ranges(
            [item.url for item in some], 0, _START_BYTES, on_error="return"
        )
        drawn |= {
            item.id for item, start in zip(some, starts, strict=True) if isinstance(start, bytes) and is_panel(start)
        }
    return [item for item in images if item.id not in drawn]


def _well_named(items: Sequence[Item]) -> tuple[list[Item], list[Skipped]]:
    """Items with unique ids in valid UTF-8; and the other items, skipped."""
    kept: dict[str, Item] = {}
    skipped = []
    for item in items:
        try:
            item.id.encode()
        except UnicodeEncodeError:
            skipped.append(Skipped(ascii(item.id), "the name is not UTF-8; rename the file"))
            continue
        if item.id in kept:
            skipped.append(Skipped(item.id, "duplicate name; the first item is used"))
        else:
            kept[item.id] = item
    return list(kept.values()), skipped


def read_list(storage: Storage, address: str) -> tuple[list[Item], list[Skipped]]:
    """The images of a text list in order, without blank lines and lines starting with ``#``.

    Local files are checked now, remote files on reading, because each check takes a request.

    Raises:
        PhotoError: if the list cannot be read, or the library for an address in it is not installed.
    """
    try:
        content = storage.read(address)
    except Exception as error:  # every service has its own exceptions
        raise PhotoError(f"{address}: the list cannot be read ({reason_of(error)})") from error
    with reporting(f"{address}: expected a list of images as UTF-8 text, found other bytes"):
        text = content.decode("utf-8-sig")
    items = []
    skipped = []
    first: dict[str, int] = {}  # line number of each path
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.strip(" \t\r")
        if not line or line.startswith("#"):
            continue
        try:
            place = _place_of(line, address)
            before = first.setdefault(os.path.normpath(place) if not scheme_of(place) else place, number)
            if before != number:
                raise ValueError(f"a duplicate of line {before}")
            _check(storage, place)
        except ValueError as error:
            skipped.append(Skipped(line, f"line {number}: {error}"))
        else:
            items.append(Item(line, place))
    return items, skipped


def _place_of(line: str, address: str) -> str:
    """The path or address on a line of the list at ``address``.

    Raises:
        ValueError: if a remote list names a file of this machine or of another server.
    """
    place = local_or_remote(line)
    if not scheme_of(address):
        return place if scheme_of(place) else str(Path(address).parent / place)  # an absolute path stays as it is
    if scheme_of(place):
        theirs, own = (_server(name) for name in (place, address))
        if theirs != own:
            raise ValueError(
                f"an address outside {own[0]}://{own[1]}, the server of the list; to allow it, download the list and "
                "give the local file"
            )
        return place
    if place != line or place.startswith("/"):
        raise ValueError(f"a path on this machine in a list at {scheme_of(address)}://; expected a full address")
    scheme, _, path = path_of(address).partition("://")
    joined = posixpath.join(posixpath.dirname(path), place)
    if any(part in (".", "..") for part in place.split("/")):
        joined = posixpath.normpath(joined)
    if joined.split("/")[0] != path.split("/")[0]:
        raise ValueError("a path outside the list's bucket or server")
    return f"{scheme}://{joined}"


def _server(address: str) -> tuple[str, str]:
    """Scheme and host (or bucket) of an address."""
    parts = urlsplit(address)
    return parts.scheme, parts.netloc.lower()


def _check(storage: Storage, place: str) -> None:
    """Raise ValueError for entries that are not image files, as far as is known without a request."""
    if is_shard(place):
        raise ValueError("a tar shard; give shards as a file, a folder or a pattern, not in a list")
    if scheme_of(place):
        storage.filesystem(place)  # report a missing library once, not for every photo
        return
    try:
        kind = storage.kind(place)
    except PhotoError as error:
        raise ValueError(reason_of(error)) from error
    if kind != "file":
        raise ValueError("a folder; expected an image file" if kind else "no such file")
