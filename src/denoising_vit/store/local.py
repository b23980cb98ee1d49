"""Objects as files below a folder."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from denoising_vit.files import atomic_path, flush_file, flush_folder
from denoising_vit.store.objects import Objects

if TYPE_CHECKING:
    from zarr.abc.store import Store


class LocalObjects(Objects):
    """Files below a folder: a temporary file, then a rename."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()  # worker processes may run in another folder
        self.url = str(self._root)

    def read(self, key: str) -> bytes:
        """The whole file."""
        try:
            return (self._root / key).read_bytes()
        except NotADirectoryError as error:  # the root is a file
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._root / key)) from error

    def write(self, key: str, data: bytes, *, durable: bool = True) -> None:
        """Temporary file, ``fsync`` if durable, rename, and the same for the folder."""
        target = self._root / key
        self._make_folder(target.parent)
        with atomic_path(target, durable=durable) as temporary:
            temporary.write_bytes(data)

    def create(self, key: str, data: bytes) -> bool:
        """As :meth:`write`, by a hard link, which fails where there is something."""
        target = self._root / key
        self._make_folder(target.parent)
        try:
            with atomic_path(target, new=True, durable=True) as temporary:
                temporary.write_bytes(data)
        except FileExistsError:
            return False
        return True

    def _make_folder(self, folder: Path) -> None:
        """Makes it; a power cut must not take a new folder with what was flushed into it."""
        missing = [above for above in (folder, *folder.parents) if not above.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for made in missing:
            flush_folder(made.parent)

    def delete(self, key: str) -> None:
        """Removes the file."""
        (self._root / key).unlink(missing_ok=True)

    def delete_below(self, folder: str) -> None:
        """Removes the folder."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._root / folder)

    def names(self, folder: str = "") -> list[str]:
        """Sorted names without hidden ones: temporary files are hidden."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return sorted(path.name for path in (self._root / folder).iterdir() if not path.name.startswith("."))
        return []

    def used(self) -> int:
        """Bytes of all files."""
        total = 0
        for folder, _, names in os.walk(self._root):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # others may be writing
                    total += (Path(folder) / name).stat().st_size
        return total

    def zarr(self, folder: str, *, read_only: bool) -> Store:
        """As zarr sees it: it writes temporary files and renames them as well."""
        from zarr.storage import LocalStore

        return LocalStore(self._root / folder, read_only=read_only)

    def settle(self, key: str) -> None:
        """Has the file's content reach the disk, and the folders that it is in."""
        path = self._root / key
        flush_file(path)
        while path != self._root:
            path = path.parent
            flush_folder(path)

    def stamp(self, key: str) -> object:
        """Time, size and number of the file."""
        try:
            told = (self._root / key).stat()
        except FileNotFoundError:
            return None
        return told.st_mtime_ns, told.st_size, told.st_ino

    def sweep(self, keys: Iterable[str]) -> None:
        """Removes temporary files of these objects."""
        targets: dict[PurePosixPath, set[str]] = defaultdict(set)
        for key in map(PurePosixPath, keys):
            targets[key.parent].add(key.name)
        for folder, names in targets.items():
            for path in (self._root / folder).glob(".*.part"):
                if path.name[1:].rsplit(".", 2)[0] in names:  # .<name>.<random>.part
                    path.unlink(missing_ok=True)
