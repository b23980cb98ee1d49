"""Names of the files below a folder, here or at an fsspec address; hidden ones are left out."""

from __future__ import annotations

import logging
import os
import posixpath
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from denoising_vit.data.items import Skipped
from denoising_vit.data.photos import IMAGE_SUFFIXES
from denoising_vit.data.storage import Storage, reason_of, scheme_of, suffix_of
from denoising_vit.errors import PhotoError

_LOG = logging.getLogger(__name__)

#: Endings that are named of what is left out.
_MOST_NAMED = 5


def files_below(storage: Storage, folder: str) -> tuple[list[str], list[Skipped]]:
    """Files at any depth, as paths relative to the folder, sorted; and what is in the way.

    Links to folders are followed (class folders of subsets are often links), except into a folder that they are in.

    Raises:
        PhotoError: if the folder itself cannot be read.
    """
    try:
        if not scheme_of(folder):
            return _local_files_below(folder)
        filesystem = storage.filesystem(folder)
        filesystem.invalidate_cache()  # what was there a while ago is of no use
        names = [relative_to(storage, name, folder) for name in filesystem.find(folder)]
        return sorted(name for name in names if name and not is_hidden(name)), []
    except PhotoError:
        raise
    except Exception as error:  # every service has its own kinds
        raise PhotoError(f"{folder}: the folder cannot be listed ({reason_of(error)})") from error


def image_names(names: Iterable[str], place: str) -> list[str]:
    """Those with an ending of images; how many others there are is logged.

    Args:
        names: of files, as paths or addresses.
        place: where they are, for the log.
    """
    names = list(names)
    images = [name for name in names if suffix_of(name) in IMAGE_SUFFIXES]
    if len(images) < len(names):
        others = Counter(suffix_of(name) or "no ending" for name in names if suffix_of(name) not in IMAGE_SUFFIXES)
        told = ", ".join(f"{count} {ending}" for ending, count in others.most_common(_MOST_NAMED))
        more = ", ..." if len(others) > _MOST_NAMED else ""
        files = f"{others.total()} file{'s' if others.total() > 1 else ''}"
        _LOG.info("%s: %s left out whose ending is not that of an image (%s%s)", place, files, told, more)
    return images


def _local_files_below(root: str) -> tuple[list[str], list[Skipped]]:
    files: list[str] = []
    skipped: list[Skipped] = []
    waiting = [("", frozenset({Path(root).resolve()}))]  # a folder, and the folders that it is in
    while waiting:
        below, around = waiting.pop()
        try:
            entries = list(os.scandir(Path(root) / below))
        except OSError as error:
            if not below:
                raise
            skipped.append(Skipped(below, f"a folder that cannot be read ({reason_of(error)})"))
            continue
        for entry in entries:
            name = posixpath.join(below, entry.name)
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    target = Path(entry.path).resolve()
                    if target in around:
                        skipped.append(Skipped(name, f"a link to {target}, a folder that it is in"))
                    else:
                        waiting.append((name, around | {target}))
                elif entry.is_file():
                    files.append(name)
                elif entry.is_symlink():
                    skipped.append(Skipped(name, "a link to a file that is not there"))
            except OSError as error:  # links in a circle
                skipped.append(Skipped(name, reason_of(error)))
    return sorted(files), sorted(skipped, key=lambda entry: entry.item)


def relative_to(storage: Storage, address: str, folder: str) -> str:
    """The path of an address below a folder, with ``/`` between its parts."""
    if not scheme_of(folder):
        return Path(address).relative_to(folder).as_posix()
    filesystem = storage.filesystem(folder)
    above = filesystem._strip_protocol(folder).rstrip("/")
    return filesystem._strip_protocol(address).removeprefix(above).lstrip("/")


def is_hidden(name: str) -> bool:
    """Whether any part of a relative path begins with a dot."""
    return any(part.startswith(".") for part in name.split("/"))
