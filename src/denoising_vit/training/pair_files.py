"""Files of kept pairs: how they get their room on the disk and are removed, and why images have no pairs."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

#: The files that tell what pairs are there, and what became of each image.
HEAD, STATE = "pairs.json", "state.u8"

#: The file that tells why images have no pairs.
REASONS = "unusable.jsonl"

#: All that a folder of pairs holds; without the first, the others are worth nothing.
_ALL = (HEAD, STATE, REASONS, "raw-*.f16", "target-*.f16")

#: How a disk says that it is full, or that a user's share of it is.
NO_ROOM = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})

#: How a file system says that it reserves nothing.
_NOT_SUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS})


def reserve(path: Path, size: int) -> None:
    """Makes a file of so many zeros, with its room on the disk where platform and file system can reserve it.

    A file with holes takes its room when it is written to, and where there is none left then, a write to a mapped file
    ends the process by a signal, without a word.

    Raises:
        OSError: if it cannot be made, or there is no room for it.
    """
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in _NOT_SUPPORTED:
                    raise
        file.truncate(size)


def has_pairs(folder: Path) -> bool:
    """Whether a folder holds pairs of any image, or the word that one has none."""
    state = folder / STATE
    return state.is_file() and any(state.read_bytes())


def remove_pairs(folder: Path) -> None:
    """Removes what a folder holds of pairs, and nothing else.

    Raises:
        OSError: if it cannot be removed.
    """
    for pattern in _ALL:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def write_reason(folder: Path, name: str, reason: str) -> None:
    """Adds why an image has no pairs. It is on the disk afterwards: the image may be marked only then.

    Raises:
        OSError: if it cannot be written.
    """
    line = json.dumps([name, reason]).encode() + b"\n"
    with (folder / REASONS).open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # half a line, of a crash: this one must not be part of it
                line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_reasons(folder: Path) -> dict[str, str]:
    """Why images have no pairs, by id; half lines, which a crash may have left, are passed over."""
    path, found = folder / REASONS, {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            name, reason = json.loads(line)
            found[str(name)] = str(reason)
        except (ValueError, TypeError):
            continue
    return found
