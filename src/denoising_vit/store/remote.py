"""Objects at any URL that fsspec knows; and which of both kinds a URL means."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from denoising_vit.errors import StoreError
from denoising_vit.store.local import LocalObjects
from denoising_vit.store.objects import Objects

if TYPE_CHECKING:
    from zarr.abc.store import Store

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://")  # at least two letters, or C:\ would be one
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}


def open_objects(url: str | Path) -> Objects:
    """The objects below a local path or any URL that fsspec knows; credentials come from the environment.

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


class RemoteObjects(Objects):
    """Objects in an object store: one put is atomic, and another writer's are seen at once."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        scheme = url.split("://", 1)[0]
        try:
            self._connection, root = self._connect()
        except ImportError as error:
            extra = _EXTRAS.get(scheme)
            remedy = f"pip install 'denoising-vit[{extra}]'" if extra else "install the library that the reason names"
            raise StoreError(f"{url}: reading {scheme}:// is not possible here ({error}); {remedy}") from error
        except ValueError as error:  # a scheme that nobody knows
            raise StoreError(f"{url}: expected a folder or a URL such as s3://bucket/store ({error})") from error
        self._root = str(root).rstrip("/")
        self._pid = os.getpid()

    def _connect(self) -> tuple[Any, str]:
        # Listings must not be cached: other machines write as well.
        return fsspec.url_to_fs(self.url, use_listings_cache=False)

    @property
    def _files(self) -> Any:
        """The file system; its connections do not survive a fork."""
        if self._pid != os.getpid():
            self._connection, self._pid = self._connect()[0], os.getpid()
        return self._connection

    def read(self, key: str) -> bytes:
        """One get."""
        return bytes(self._files.cat_file(self._path(key)))

    def write(self, key: str, data: bytes, *, durable: bool = True) -> None:
        """One put."""
        del durable  # it always is
        self._files.pipe_file(self._path(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """One conditional put, where the service and its library know them (S3, Google Cloud)."""
        try:
            self._files.pipe_file(self._path(key), data, mode="create")
        except FileExistsError:
            # A put that is sent again because its answer was lost meets itself.
            with contextlib.suppress(FileNotFoundError):
                return self.read(key) == data
            return False
        return True

    def delete(self, key: str) -> None:
        """One delete."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(key))

    def delete_below(self, folder: str) -> None:
        """Deletes all with this prefix."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm(self._path(folder), recursive=True)

    def names(self, folder: str = "") -> list[str]:
        """One listing."""
        path = self._path(folder)
        self._files.invalidate_cache(path)
        try:
            found = self._files.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (str(item).rstrip("/").rsplit("/", 1)[-1] for item in found if str(item).strip("/") != path.strip("/"))
        return sorted(name for name in names if not name.startswith("."))

    def used(self) -> int:
        """Bytes of all objects, from listings."""
        return int(self._files.du(self._root))

    def zarr(self, folder: str, *, read_only: bool) -> Store:
        """As zarr sees it: it runs its own connection in its own event loop."""
        from zarr.storage import FsspecStore

        return FsspecStore.from_url(f"{self.url}/{folder}", read_only=read_only)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root
