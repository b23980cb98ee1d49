"""Files of kept pairs: how they get their room on the disk and are removed, and why images have no pairs."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

#: The files that tell what pairs are there, and what became of each image.
HEAD, STATE = "pairs.json", "state.u8"

#: The file that tells why images have no pairs.
REASONS = "unusable.jsonl"

#: All that a folder of pairs holds; without the first, the others are worth nothing.
_ALL = (HEAD, STATE, REASONS, "raw-*.f16", "target-*.f16")

#: Rows that are written before their marks are.
_AT_ONCE = 16

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


class RowWriter:
    """Writes rows of files that are there, and marks them in the first file only when they are on the disk.

    Used as a context, at whose end all that was written is marked, also after an error. Exactly the bytes of a row are
    written, so that machines which share the files over a network do not overwrite each other's rows, as they would
    through memory maps, which write whole pages.

    Args:
        files: one byte a row in the first, one array a row in each of the others.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._paths = files
        self._open = contextlib.ExitStack()
        self._marks: dict[int, int] = {}

    def write(self, row: int, arrays: Sequence[np.ndarray]) -> None:
        """One array for each file but the first.

        Raises:
            OSError: if they cannot be written.
        """
        for file, array in zip(self._files[1:], arrays, strict=True):
            content = np.ascontiguousarray(array).data.cast("B")
            file.seek(row * len(content))
            file.write(content)

    def mark(self, row: int, mark: int) -> None:
        """What became of a row; it reaches the disk after the row itself, some rows at a time.

        Raises:
            OSError: if it cannot be written.
        """
        self._marks[row] = mark
        if len(self._marks) >= _AT_ONCE:
            self._settle()

    def _settle(self) -> None:
        state, *arrays = self._files
        for file in arrays if self._marks else ():
            _flush(file)
        for row, mark in self._marks.items():
            state.seek(row)
            state.write(bytes([mark]))
        if self._marks:
            _flush(state)
        self._marks.clear()

    def __enter__(self) -> Self:
        self._files = [self._open.enter_context(path.open("r+b")) for path in self._paths]
        return self

    def __exit__(self, *_exception: object) -> None:
        with self._open:
            self._settle()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


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
