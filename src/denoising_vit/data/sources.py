"""From what a user names to a data set: a folder, an image, a text list, tar shards, or a pattern of them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from pathlib import Path

from denoising_vit.data.folders import files_below, image_names, is_hidden, relative_to
from denoising_vit.data.items import Item, Skipped
from denoising_vit.data.lists import read_list
from denoising_vit.data.patterns import expand_braces, folder_of_pattern, is_pattern, matches
from denoising_vit.data.photos import IMAGE_SUFFIXES, is_panel, is_panel_start, read_photo_bytes
from denoising_vit.data.reading import Dataset
from denoising_vit.data.shards import index_shards, is_shard
from denoising_vit.data.storage import Storage, can_list, local_or_remote, path_of, scheme_of, suffix_of
from denoising_vit.errors import PhotoError

_EXPECTED = "expected a folder of images, an image file, a text list of images (.txt) or uncompressed tar shards (.tar)"

#: How much of a remote PNG shows whether it is a panel, and of how many this is asked at once.
_START_BYTES, _AT_ONCE = 1024, 4096


def open_dataset(source: str | Path) -> Dataset:
    """Finds the images of a source; none is read yet.

    A folder is searched at every depth; where it holds no images but tar shards, those are the source. Hidden files
    and pictures that this package drew of results are left out. The order and the ids do not depend on where the source
    is: a copy elsewhere gives the same.

    Args:
        source: a path or an fsspec address (``s3://``, ``gs://``, ``https://``, ...) of a folder, an image, a text list
            or a tar shard, or a pattern of images or shards: a glob, or braces like ``shards-{0000..0009}.tar``.
            At ``https://`` nothing can be listed: only files named outright, lists and braces.

    Raises:
        PhotoError: if nothing is there or no image in it, or if it cannot be reached.
    """
    name = str(source)
    if not name.strip():
        raise PhotoError(f"{_EXPECTED}, found an empty name")
    if isinstance(source, Path) and (collapsed := re.match(r"([A-Za-z0-9]{2,}):/", name)):
        raise PhotoError(f"{name}: give {collapsed[1]}:// addresses as str; a Path loses one of the slashes")
    storage = Storage()
    address = local_or_remote(name)
    if not scheme_of(address):
        address = str(Path(address).absolute())  # workers elsewhere may have another present directory
    items, skipped = _find(storage, address)
    items, doubtful = _well_named(items)
    skipped = [*skipped, *doubtful]
    if not items:
        reasons = "; ".join(f"{entry.item}: {entry.reason}" for entry in skipped[:3])
        more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        raise PhotoError(f"{name}: {_EXPECTED}, found none in it{f' ({reasons}{more})' if reasons else ''}")
    return Dataset(name, items, skipped)


def _find(storage: Storage, address: str) -> tuple[list[Item], list[Skipped]]:
    """Images sorted by id, those of a list in its order; and what is none."""
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
            f"{address}: {scheme_of(address)}:// servers do not list what they have; expected a text list of images "
            "(.txt), an image, or tar shards (.tar) named outright or by braces like shards-{0000..0009}.tar"
        )
    return _from_file(storage, address)


def _from_file(storage: Storage, address: str) -> tuple[list[Item], list[Skipped]]:
    """What a file named outright holds; an image may have any ending, and may be a panel."""
    name = posixpath.basename(path_of(address)) if scheme_of(address) else Path(address).name
    if is_shard(address):
        return index_shards(storage, [(name, address)])
    if suffix_of(address) == ".txt":
        return read_list(storage, address)
    if suffix_of(address) not in IMAGE_SUFFIXES:
        try:
            read_photo_bytes(storage.read(address), name)
        except Exception as error:  # every service has its own kinds
            raise PhotoError(f"{address}: {_EXPECTED}, found a file that is none of these") from error
    return [Item(name, address)], []


def _from_pattern(storage: Storage, pattern: str) -> tuple[list[Item], list[Skipped]]:
    """Ids begin after the folder in which the pattern begins, as if that folder had been given."""
    files: list[tuple[str, str]] = []
    skipped: list[Skipped] = []
    above = folder_of_pattern(pattern)

    def take(address: str) -> None:
        files.append((relative_to(storage, path_of(address), above), address))

    for name in expand_braces(pattern):
        if not can_list(name) or (is_shard(name) and not is_pattern(name)):
            take(name)  # if it is not there, its index will say so
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
    """The images among files (name, address), or those in the tar shards among them if there are no images."""
    shown = sorted((name, address) for name, address in files if not is_hidden(name))
    shards = [(name, address) for name, address in shown if is_shard(address)]
    found = set(image_names((address for _, address in shown if not is_shard(address)), place))
    images = [Item(name, address) for name, address in shown if address in found]
    items = _without_panels(storage, images)
    if not items:
        return index_shards(storage, shards)
    reason = "a tar archive beside images, which may hold the same ones; give it as a data set of its own"
    return items, [Skipped(name, reason) for name, _ in shards]


def _without_panels(storage: Storage, images: list[Item]) -> list[Item]:
    drawn = {item.id for item in images if not scheme_of(item.url) and is_panel(Path(item.url))}
    remote = [item for item in images if scheme_of(item.url) and can_list(item.url) and suffix_of(item.url) == ".png"]
    for first in range(0, len(remote), _AT_ONCE):
        some = remote[first : first + _AT_ONCE]
        starts = storage.filesystem(some[0].url).cat_ranges(
            [item.url for item in some], 0, _START_BYTES, on_error="return"
        )
        drawn |= {item.id for item, start in zip(some, starts, strict=True) if _shows_panel(start)}
    return [item for item in images if item.id not in drawn]


def _shows_panel(start: object) -> bool:
    """Of a file that cannot be read there is an error in place of its start; that is told when it is its turn."""
    return isinstance(start, bytes) and is_panel_start(start)


def _well_named(items: Sequence[Item]) -> tuple[list[Item], list[Skipped]]:
    """Ids are unique and can be written down as text."""
    kept: dict[str, Item] = {}
    skipped = []
    for item in items:
        try:
            item.id.encode()
        except UnicodeEncodeError:
            skipped.append(Skipped(ascii(item.id), "a name that is not UTF-8; rename it"))
            continue
        if item.id in kept:
            skipped.append(Skipped(item.id, "a second item of this name; the first is taken"))
        else:
            kept[item.id] = item
    return list(kept.values()), skipped
