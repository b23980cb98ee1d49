"""Objects in a local folder or at an fsspec URL: the few atomic operations that a store needs.

zarr is imported lazily, because the import takes a quarter of a second.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import fsspec

from denoising_vit.data.storage import EXTRAS
from denoising_vit.errors import StoreError
from denoising_vit.files import atomic_path, extra_hint, flush_file, flush_folder, make_folder

if TYPE_CHECKING:
    from zarr.abc.store import Store

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://")  # at least two letters, to exclude C:\


def open_objects(url: str | Path) -> Objects:
    """The objects in a local path or at an fsspec URL; credentials come from the environment.

    Raises:
        StoreError: if the name is empty, or this kind of URL needs a library that is not installed.
    """
    text = str(url)
    if not text.strip():
        raise StoreError("expected a folder or URL for the store, got an empty name")
    if text.startswith("file://"):
        return LocalObjects(Path(text.removeprefix("file://")))
    if _SCHEME.match(text) is None:
        return LocalObjects(Path(text).expanduser())
    return RemoteObjects(text)


class Objects(ABC):
    """Objects below one root. Keys are relative paths with slashes.

    Attributes:
        url: the root, as shown to users and for opening it again in another process.
    """

    url: str

    @abstractmethod
    def read(self, key: str) -> bytes:
        """Read the whole object.

        Raises:
            FileNotFoundError: if it does not exist.
        """

    @abstractmethod
    def write(self, key: str, data: bytes | list[bytes], *, durable: bool = True) -> None:
        """Write or replace an object atomically, given as a whole or in parts; ``durable`` flushes it to disk.

        Raises:
            OSError: if it cannot be written; the previous object is kept.
        """

    @abstractmethod
    def create(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        """Write a new object; False if it already exists."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete an object, if it exists."""

    @abstractmethod
    def delete_below(self, folder: str) -> None:
        """Delete a folder and its contents, if it exists."""

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """Sorted names directly in a folder, without unfinished objects; empty if it does not exist."""

    @abstractmethod
    def used(self) -> int:
        """Total size of all objects in bytes."""

    @abstractmethod
    def zarr(self, folder: str, *, read_only: bool) -> Store:
        """A folder as a zarr store."""

    def settle(self, key: str) -> None:  # noqa: B027, only files need it
        """Flush an object that another library wrote."""

    def stamp(self, key: str) -> object:
        """A value that changes when the object is rewritten, as far as this is known without reading it.

        Object stores return a constant, because a query would cost as much as reading.
        """
        del key
        return ()

    def sweep(self, keys: Iterable[str]) -> None:  # noqa: B027, only files need it
        """Delete unfinished versions of these objects, left by killed writers."""

    def probe(self) -> None:
        """Check write permission by writing and deleting an object.

        Raises:
            StoreError: if this fails.
        """
        key = f".probe-{secrets.token_hex(4)}"
        try:
            self.write(key, b"", durable=False)
            self.delete(key)
        except Exception as error:  # object stores have their own exceptions
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise StoreError(
                f"{self.url}: cannot be written to ({reason}); choose a writable location, or open it for reading"
            ) from error


class LocalObjects(Objects):
    """Objects as files, each written to a temporary file and renamed."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()  # worker processes may have another working directory
        self.url = str(self._root)

    def read(self, key: str) -> bytes:
        """Read the whole file."""
        try:
            return (self._root / key).read_bytes()
        except NotADirectoryError as error:  # the root is a file
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._root / key)) from error

    def write(self, key: str, data: bytes | list[bytes], *, durable: bool = True) -> None:
        """Write a temporary file, flush it, rename it, flush the folder."""
        self._write(key, data, durable=durable, new=False)

    def create(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        """Like :meth:`write`, with a hard link, which fails if the file exists."""
        try:
            self._write(key, data, durable=durable, new=True)
        except FileExistsError:
            return False
        return True

    def _write(self, key: str, data: bytes | list[bytes], *, durable: bool, new: bool) -> None:
        target = self._root / key
        make_folder(target.parent)
        with atomic_path(target, durable=durable, new=new) as temporary, temporary.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)

    def delete(self, key: str) -> None:
        """Delete the file."""
        (self._root / key).unlink(missing_ok=True)

    def delete_below(self, folder: str) -> None:
        """Delete the folder."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._root / folder)

    def names(self, folder: str = "") -> list[str]:
        """Names of files and folders, except hidden ones, which are temporary files."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return sorted(name for name in os.listdir(self._root / folder) if not name.startswith("."))  # noqa: PTH208
        return []

    def used(self) -> int:
        """Total size of all files."""
        total = 0
        for folder, _, names in os.walk(self._root):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # other processes may be writing
                    total += (Path(folder) / name).stat().st_size
        return total

    def zarr(self, folder: str, *, read_only: bool) -> Store:
        """A zarr store that also writes temporary files and renames them."""
        from zarr.storage import LocalStore

        return LocalStore(self._root / folder, read_only=read_only)

    def settle(self, key: str) -> None:
        """Flush the file and all folders above it in the store."""
        path = self._root / key
        flush_file(path)
        while path != self._root:
            path = path.parent
            flush_folder(path)

    def stamp(self, key: str) -> object:
        """Modification time, size and inode."""
        try:
            status = (self._root / key).stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def sweep(self, keys: Iterable[str]) -> None:
        """Delete temporary files of these objects."""
        targets: dict[PurePosixPath, set[str]] = defaultdict(set)
        for key in map(PurePosixPath, keys):
            targets[key.parent].add(key.name)
        for folder, names in targets.items():
            for path in (self._root / folder).glob(".*.part"):
                if path.name[1:].rsplit(".", 2)[0] in names:  # .<name>.<random>.part
                    path.unlink(missing_ok=True)


class RemoteObjects(Objects):
    """Objects in an object store, where a put is atomic and immediately visible to others."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        scheme = url.split("://", 1)[0]
        try:
            self._connection, root = self._connect()
        except ImportError as error:
            extra = EXTRAS.get(scheme)
            remedy = f"install {extra_hint(extra)}" if extra else "install the missing library"
            raise StoreError(f"{url}: {scheme}:// is not supported by this installation ({error}); {remedy}") from error
        except ValueError as error:  # an unknown scheme
            raise StoreError(f"{url}: expected a folder or a URL such as s3://bucket/store ({error})") from error
        self._root = str(root).rstrip("/")
        self._pid = os.getpid()

    def _connect(self) -> tuple[Any, str]:
        # Listings must not be cached, because other machines also write.
        return fsspec.url_to_fs(self.url, use_listings_cache=False)

    @property
    def _files(self) -> Any:
        """The fsspec file system; connections do not survive a fork."""
        if self._pid != os.getpid():
            self._connection, self._pid = self._connect()[0], os.getpid()
        return self._connection

    def read(self, key: str) -> bytes:
        """Read the object in one request."""
        return bytes(self._files.cat_file(self._path(key)))

    def write(self, key: str, data: bytes | list[bytes], *, durable: bool = True) -> None:
        """Write the object in one request, which is always durable."""
        del durable
        self._files.pipe_file(self._path(key), data if isinstance(data, bytes) else b"".join(data))

    def create(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        """Create the object with a conditional put, if the service and the library support it (S3, Google Cloud)."""
        del durable
        try:
            self._files.pipe_file(self._path(key), data, mode="create")
        except FileExistsError:
            # A put that is retried after a lost response finds its own object.
            with contextlib.suppress(FileNotFoundError):
                return self.read(key) == data
            return False
        return True

    def delete(self, key: str) -> None:
        """Delete the object in one request."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(key))

    def delete_below(self, folder: str) -> None:
        """Delete all objects with this prefix."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm(self._path(folder), recursive=True)

    def names(self, folder: str = "") -> list[str]:
        """Names from one uncached listing."""
        path = self._path(folder)
        self._files.invalidate_cache(path)
        try:
            found = self._files.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (str(item).rstrip("/").rsplit("/", 1)[-1] for item in found if str(item).strip("/") != path.strip("/"))
        return sorted(name for name in names if not name.startswith("."))

    def used(self) -> int:
        """Total size, from listings."""
        return int(self._files.du(self._root))

    def zarr(self, folder: str, *, read_only: bool) -> Store:
        """A zarr store with its own connection in its own event loop."""
        from zarr.storage import FsspecStore

        return FsspecStore.from_url(f"{self.url}/{folder}", read_only=read_only)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root
