"""Index of the images in tar shards, so that they can be read without unpacking."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from denoising_vit.data.dataset import Item, Skipped
from denoising_vit.data.listing import image_names, is_hidden
from denoising_vit.data.photos import IMAGE_SUFFIXES
from denoising_vit.data.storage import Storage, can_list, path_of, reason_of

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")

#: First bytes of compressed files.
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}

#: Number of threads that index shards; with remote shards, they mostly wait for the network.
_WORKERS = 8


def is_shard(address: str) -> bool:
    """True if a file has the suffix of a tar archive, compressed or not."""
    return path_of(address).lower().endswith((".tar", *_COMPRESSED))


def index_shards(storage: Storage, shards: Sequence[tuple[str, str]]) -> tuple[list[Item], list[Skipped]]:
    """The images in tar shards, each with its byte range, sorted by id; and unusable entries.

    Shards are given by name, which is the prefix of their members' ids, and address. In a truncated or damaged shard,
    members before the damage are used.
    """
    items: list[Item] = []
    skipped: list[Skipped] = []
    names: list[str] = []
    with ThreadPoolExecutor(max(1, min(_WORKERS, len(shards))), thread_name_prefix="dvit-index") as pool:
        for found, left, members in pool.map(lambda shard: _index_shard(storage, *shard), shards):
            items += found
            skipped += left
            names += members
    image_names(names, "tar shards")
    return sorted(items, key=lambda item: item.id), skipped


def _index_shard(storage: Storage, name: str, address: str) -> tuple[list[Item], list[Skipped], list[str]]:
    """Images of a shard, unusable entries, and, if it has images, the names of its files."""
    if path_of(address).lower().endswith(_COMPRESSED):
        return [], [Skipped(name, _compressed("by its name"))], []
    try:
        with storage.open(address) as file:
            length = _length(file, address)
            start = file.read(8)
            file.seek(0)
            if kinds := [kind for magic, kind in _MAGIC.items() if start.startswith(magic)]:
                return [], [Skipped(name, _compressed(kinds[0]))], []
            if not length:
                return [], [Skipped(name, "the file is empty (0 bytes)")], []
            members, fault = _scan(file, length)
    except Exception as error:  # every service has its own exceptions
        return [], [Skipped(name, reason_of(error))], []
    items, skipped = _images(members, name, address)
    if fault:
        skipped.append(Skipped(name, f"{fault}; {len(items)} images before it are used"))
    elif not items and not skipped:
        count = sum(not member.isdir() for member in members)
        skipped.append(Skipped(name, f"no image files among its {count} members" if count else "an empty tar archive"))
    shown = (member.name for member in members if member.isreg())
    return items, skipped, [name for name in shown if items and not is_hidden(posixpath.normpath(name))]


def _length(file: BinaryIO, address: str) -> int:
    """The length of a shard; OSError if parts of it cannot be read."""
    try:
        length = file.seek(0, 2)
        if length > 1 and not can_list(address):
            file.seek(length - 1)
            file.read(1)
        file.seek(0)
    except ValueError as error:  # from fsspec, if the server sends the whole file
        raise OSError("its server does not support byte ranges; download the shard first") from error
    return length


def _compressed(kind: str) -> str:
    return f"a compressed archive ({kind}), which does not support random access; decompress it to a plain .tar first"


def _scan(file: BinaryIO, length: int) -> tuple[list[tarfile.TarInfo], str]:
    """Complete members, and a description of the damage to the archive, if any.

    ``tarfile`` treats a damaged header as the end, and does not check that the last member is complete.
    """
    members: list[tarfile.TarInfo] = []
    place = -1
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.offset_data <= place or member.size < 0:
                    return members, f"damaged at byte {place:,}"  # a negative size would loop forever
                place = member.offset_data
                if member.isreg() and place + member.size > length:
                    return members, f"truncated at byte {length:,}, within {member.name}"
                members.append(member)
            place = archive.offset
            file.seek(place)
            block = file.read(tarfile.BLOCKSIZE)
    except Exception as error:  # tarfile raises many kinds of errors for damaged headers
        return members, f"not a tar archive, or damaged ({reason_of(error)})"
    if block.strip(b"\0"):
        return members, f"damaged at byte {place:,}"
    if len(block) < tarfile.BLOCKSIZE:
        return members, f"truncated at byte {length:,}, where another member or the end mark was expected"
    return members, ""


def _images(members: list[tarfile.TarInfo], shard: str, address: str) -> tuple[list[Item], list[Skipped]]:
    items = []
    skipped = []
    for member in members:
        if posixpath.splitext(member.name)[1].lower() not in IMAGE_SUFFIXES or member.isdir():
            continue
        name = posixpath.normpath(member.name)
        if reason := _unusable(member):
            skipped.append(Skipped(f"{shard}/{member.name}", reason))
        elif not is_hidden(name):  # such as ._a.jpg of macOS
            items.append(Item(f"{shard}/{name}", address, member.offset_data, member.size))
    return items, skipped


def _unusable(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return f"a link (to {member.linkname}); links in shards are not followed"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "a path outside the archive"
    if not member.isreg() or member.issparse():
        return "not a regular file"
    return ""
