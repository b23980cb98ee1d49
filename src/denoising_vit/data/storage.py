"""Access to local paths and fsspec addresses."""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import fsspec

from denoising_vit.errors import PhotoError
from denoising_vit.files import extra_hint

#: Extra of this package that installs a scheme's library.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}

#: Schemes whose servers cannot list files.
_WITHOUT_LISTING = frozenset({"http", "https"})

#: Maximum size of a file to read: a photo of 100 million pixels of 8 bytes, uncompressed.
MAX_BYTES = 1 << 30


def scheme_of(address: str) -> str:
    """The scheme of an address, such as ``s3``; empty for a local path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", address)
    return match[1].lower() if match else ""


def local_or_remote(address: str) -> str:
    """Convert ``file:///a`` to a path; other addresses are unchanged."""
    return re.sub(r"^(?:file|local)://", "", address, flags=re.IGNORECASE)


def can_list(address: str) -> bool:
    """True if folders can be listed and patterns matched at this address."""
    return scheme_of(address) not in _WITHOUT_LISTING


def path_of(address: str) -> str:
    """The address without query and fragment of a URL."""
    return address if can_list(address) else re.split(r"[?#]", address, maxsplit=1)[0]


def suffix_of(address: str) -> str:
    """The suffix in lower case, with the dot."""
    return posixpath.splitext(path_of(address))[1].lower()


def reason_of(error: Exception) -> str:
    """The message of an error without the path, which the caller adds."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


@contextlib.contextmanager
def reporting(problem: str) -> Iterator[None]:
    """Convert any error to a PhotoError with this message and the reason; every service has its own exceptions."""
    try:
        yield
    except PhotoError:
        raise
    except Exception as error:
        raise PhotoError(f"{problem} ({reason_of(error)})") from error


class Storage:
    """Access to local paths and fsspec addresses; it can be pickled, shared between threads, and used after a fork.

    fsspec has one file system with its own connections per thread; here all threads of a process share one.
    """

    def __init__(self) -> None:
        self._filesystems: dict[tuple[int, str, str], fsspec.AbstractFileSystem] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # connections cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()

    def filesystem(self, address: str) -> Any:
        """The fsspec file system of a remote address.

        Raises:
            PhotoError: if the scheme is unknown or its library is not installed.
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
            extra = EXTRAS.get(scheme)
            remedy = f"install {extra_hint(extra)}" if extra else str(error)
            raise PhotoError(f"{address}: {scheme}:// needs a library that is not installed: {remedy}") from error
        except Exception as error:  # every service validates addresses differently
            raise PhotoError(
                f"{address}: expected a path or an fsspec address (s3://, gs://, https://, ...), got "
                f"{scheme}:// ({error})"
            ) from error

    def kind(self, address: str) -> Literal["file", "folder"] | None:
        """Type of an address; None if it does not exist.

        Raises:
            PhotoError: if it is unreachable.
        """
        with reporting(f"{address}: unreachable"), contextlib.suppress(FileNotFoundError):
            if not scheme_of(address):
                path = Path(address)
                return "folder" if path.is_dir() else "file" if path.is_file() else None
            return "folder" if self.filesystem(address).info(address)["type"] == "directory" else "file"
        return None

    def open(self, address: str) -> BinaryIO:
        """Open a file for reading and seeking."""
        if not scheme_of(address):
            return Path(address).open("rb")
        return self.filesystem(address).open(address, "rb")

    def read(self, address: str, start: int | None = None, size: int | None = None) -> bytes:
        """Read a file, or ``size`` bytes starting at ``start``.

        Raises:
            Exception: any exception of the file system; see :func:`reason_of`.
        """
        if size is not None and size > MAX_BYTES:
            raise PhotoError(f"{size:,} bytes exceed the limit of {MAX_BYTES:,} per photo")
        if scheme_of(address):
            end = None if start is None or size is None else start + size
            content = b"" if size == 0 else self.filesystem(address).cat_file(address, start=start, end=end)
        else:
            content = _read_local(Path(address), start or 0, size)
        if size is not None and len(content) != size:
            raise PhotoError(
                f"expected {size:,} bytes from byte {start:,} of {address}, got {len(content):,}; the file has changed "
                "since the data set was opened, or its server ignores byte ranges"
            )
        return content


def _read_local(path: Path, start: int, size: int | None) -> bytes:
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        if size is None and length > MAX_BYTES:
            raise PhotoError(f"{length:,} bytes exceed the limit of {MAX_BYTES:,} per photo")
        file.seek(start)
        return file.read(-1 if size is None else size)
