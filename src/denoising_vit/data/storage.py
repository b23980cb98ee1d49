"""Bytes at a local path or an fsspec address; a missing library is an error that says what to install."""

from __future__ import annotations

import os
import posixpath
import re
import threading
from pathlib import Path
from typing import Any, BinaryIO, Literal

import fsspec

from denoising_vit.errors import PhotoError

#: Which extra of this package brings the library of a scheme.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}

#: Servers of these schemes give files, not the names of files.
_WITHOUT_LISTING = frozenset({"http", "https"})

#: No photo that may be decoded is larger (100 million pixels of 8 bytes, uncompressed).
MAX_BYTES = 1 << 30


def scheme_of(address: str) -> str:
    """``s3`` of ``s3://bucket/key``; nothing for a local path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", address)
    return match[1].lower() if match else ""


def local_or_remote(address: str) -> str:
    """``file:///a`` as the path that it is, everything else unchanged."""
    return re.sub(r"^(?:file|local)://", "", address, flags=re.IGNORECASE)


def can_list(address: str) -> bool:
    """Whether names can be asked for at this address (a folder listed, a pattern matched)."""
    return scheme_of(address) not in _WITHOUT_LISTING


def path_of(address: str) -> str:
    """The address without what follows ``?`` or ``#`` in a web address: what ends in the file's ending."""
    return address if can_list(address) else re.split(r"[?#]", address, maxsplit=1)[0]


def suffix_of(address: str) -> str:
    """The ending in lower case, with its dot."""
    return posixpath.splitext(path_of(address))[1].lower()


def reason_of(error: Exception) -> str:
    """What went wrong, for people, without the path, which the caller names."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


class Storage:
    """Access to local paths and fsspec addresses; may be pickled, shared between threads, and used after a fork.

    fsspec keeps one file system a thread, each with its own connections; here all threads of a process share one.
    """

    def __init__(self) -> None:
        self._filesystems: dict[tuple[int, str, str], fsspec.AbstractFileSystem] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # connections stay in their process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()

    def filesystem(self, address: str) -> Any:
        """The fsspec file system of a remote address; its methods' types say less than their documentation.

        Raises:
            PhotoError: if fsspec does not know the scheme or its library is not installed.
        """
        scheme = scheme_of(address)
        try:
            options = fsspec.get_filesystem_class(scheme)._get_kwargs_from_urls(address)
            with self._lock:
                key = (os.getpid(), scheme, repr(sorted(options.items())))
                if key not in self._filesystems:
                    self._filesystems[key] = fsspec.filesystem(scheme, **options)
                return self._filesystems[key]
        except ImportError as error:
            extra = _EXTRAS.get(scheme)
            remedy = f"pip install 'denoising-vit[{extra}]'" if extra else str(error)
            raise PhotoError(f"{address}: {scheme}:// needs a library that is not installed: {remedy}") from error
        except ValueError as error:
            raise PhotoError(
                f"{address}: expected a path or an address that fsspec knows (s3://, gs://, https://, ...), found "
                f"{scheme}:// ({error})"
            ) from error

    def kind(self, address: str) -> Literal["file", "folder"] | None:
        """What is there, or None where nothing is.

        Raises:
            PhotoError: if it cannot be found out.
        """
        try:
            if not scheme_of(address):
                path = Path(address)
                return "folder" if path.is_dir() else "file" if path.is_file() else None
            return "folder" if self.filesystem(address).info(address)["type"] == "directory" else "file"
        except FileNotFoundError:
            return None
        except PhotoError:
            raise
        except Exception as error:  # every service has its own kinds
            raise PhotoError(f"{address}: cannot be reached ({reason_of(error)})") from error

    def open(self, address: str) -> BinaryIO:
        """A file to read from and seek in."""
        if not scheme_of(address):
            return Path(address).open("rb")
        return self.filesystem(address).open(address, "rb")

    def read(self, address: str, start: int | None = None, size: int | None = None) -> bytes:
        """All bytes of a file, or ``size`` of them from ``start`` on.

        Raises:
            Exception: of any kind that a file system raises; :func:`reason_of` makes a reason of it.
        """
        if size is not None and size > MAX_BYTES:
            raise PhotoError(f"{size:,} bytes is more than the limit of {MAX_BYTES:,} for one photo")
        if scheme_of(address):
            end = None if start is None or size is None else start + size
            content = b"" if size == 0 else self.filesystem(address).cat_file(address, start=start, end=end)
        else:
            content = _read_local(Path(address), start or 0, size)
        if size is not None and len(content) != size:
            raise PhotoError(
                f"expected {size:,} bytes from byte {start:,} of {address} on, {len(content):,} came; the file has "
                "changed since the data set was opened, or its server ignores byte ranges"
            )
        return content


def _read_local(path: Path, start: int, size: int | None) -> bytes:
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        if size is None and length > MAX_BYTES:
            raise PhotoError(f"{length:,} bytes is more than the limit of {MAX_BYTES:,} for one photo")
        file.seek(start)
        return file.read(-1 if size is None else size)
