"""Files of kept pairs, and the record of unusable images."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from denoising_vit.files import parse_json

#: The description of the pairs, and one status byte per image.
HEAD, STATE = "pairs.json", "state.u8"

#: The file with the reasons why images are unusable.
REASONS = "unusable.jsonl"

#: All files of a folder of pairs; they cannot be used without the first.
_ALL = (HEAD, STATE, REASONS, "raw-*.f16", "target-*.f16")

#: Number of rows to write before their status.
_AT_ONCE = 16

#: Errors of a full disk or an exceeded quota.
NO_ROOM = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})

#: Errors of file systems that cannot reserve space.
_NOT_SUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS})


def reserve(path: Path, size: int) -> None:
    """Create a file of zeros and reserve its disk space, if the platform supports it.

    Without reserved space, a write to a memory map on a full disk kills the process without a message.

    Raises:
        OSError: if the file cannot be created or the disk is full.
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
    """Writes rows of existing files, and their status to the first file once the rows are on disk.

    A context manager; on exit, also after an error, the status of all written rows is saved. It writes exactly the
    bytes of a row, not whole pages as memory maps do, so that machines sharing the files do not overwrite each other's
    rows.

    Args:
        files: one byte per row in the first, one array per row in each of the others.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._paths = files
        self._open = contextlib.ExitStack()
        self._marks: dict[int, int] = {}

    def write(self, row: int, arrays: Sequence[np.ndarray]) -> None:
        """Write one array to each file except the first.

        Raises:
            OSError: if they cannot be written.
        """
        for file, array in zip(self._files[1:], arrays, strict=True):
            content = np.ascontiguousarray(array).data.cast("B")
            file.seek(row * len(content))
            file.write(content)

    def mark(self, row: int, mark: int) -> None:
        """Set the status of a row; it is written after the row, for several rows at a time.

        Raises:
            OSError: if it cannot be written.
        """
        self._marks[row] = mark
        if len(self._marks) >= _AT_ONCE:
            self._settle()

    def _settle(self) -> None:
        if not self._marks:
            return
        state, *arrays = self._files
        for file in arrays:
            file.flush()
            os.fsync(file.fileno())
        for row, mark in self._marks.items():
            state.seek(row)
            state.write(bytes([mark]))
        state.flush()
        os.fsync(state.fileno())
        self._marks.clear()

    def __enter__(self) -> Self:
        self._files = [self._open.enter_context(path.open("r+b")) for path in self._paths]
        return self

    def __exit__(self, *_exception: object) -> None:
        with self._open:
            self._settle()


def has_pairs(folder: Path) -> bool:
    """True if a folder has the status of any image."""
    state = folder / STATE
    return state.is_file() and any(state.read_bytes())


def remove_pairs(folder: Path) -> None:
    """Remove the files of pairs from a folder, and no others.

    Raises:
        OSError: if one cannot be removed.
    """
    for pattern in _ALL:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def write_reason(folder: Path, name: str, reason: str) -> None:
    """Append the reason why an image is unusable, and flush it to disk.

    Raises:
        OSError: if it cannot be written.
    """
    line = json.dumps([name, reason]).encode() + b"\n"
    with (folder / REASONS).open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a crash left half a line
                line = b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_reasons(folder: Path) -> dict[str, str]:
    """Reasons why images are unusable, by id; incomplete lines, which a crash may leave, are skipped."""
    path, found = folder / REASONS, {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            name, reason = parse_json(line)
            found[str(name)] = str(reason)
        except (ValueError, TypeError):
            continue
    return found
