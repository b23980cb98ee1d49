"""Objects as files below a folder."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from denoising_vit.files import atomic_path
from denoising_vit.store.objects import Objects

if TYPE_CHECKING:
    from zarr.abc.store import Store

#: What file systems without hard links answer.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


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
        """Temporary file, ``fsync`` if durable, rename."""
        target = self._root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary, temporary.open("wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())

    def create(self, key: str, data: bytes) -> bool:
        """A hard link fails where there is something, unlike a rename, and shows no half file, unlike mode ``x``."""
        target = self._root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.part")
        try:
            temporary.write_bytes(data)
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_without_links(target, data)
        finally:
            temporary.unlink(missing_ok=True)
        return True

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
        """Has the file's content reach the disk."""
        with (self._root / key).open("rb") as file:
            os.fsync(file.fileno())

    def sweep(self, keys: Iterable[str]) -> None:
        """Removes temporary files of these objects."""
        targets: dict[PurePosixPath, set[str]] = defaultdict(set)
        for key in map(PurePosixPath, keys):
            targets[key.parent].add(key.name)
        for folder, names in targets.items():
            for path in (self._root / folder).glob(".*.part"):
                if path.name[1:].rsplit(".", 2)[0] in names:  # .<name>.<random>.part
                    path.unlink(missing_ok=True)


def _create_without_links(target: Path, data: bytes) -> bool:
    """For FAT and some network drives. A reader may see the file before its content."""
    try:
        with target.open("xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True
