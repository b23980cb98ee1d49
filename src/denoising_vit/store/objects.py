"""Whole objects under a root: the few operations that the store needs of a file system, each atomic.

zarr is imported where it is used: it takes a quarter of a second, which commands without a store need not wait for.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

from denoising_vit.errors import StoreError

if TYPE_CHECKING:
    from zarr.abc.store import Store


class Objects(ABC):
    """Objects below one root. Keys are relative, with slashes.

    Attributes:
        url: the root, for people and for opening it again in another process.
    """

    url: str

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object.

        Raises:
            FileNotFoundError: if it is not there.
        """

    @abstractmethod
    def write(self, key: str, data: bytes, *, durable: bool = True) -> None:
        """Puts an object in place, whole or not at all; ``durable`` also survives a power cut where that costs extra.

        Raises:
            OSError: if it cannot be written; what was there before is still there.
        """

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Puts an object where none is; False if there is one already."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes an object; one that is not there is fine."""

    @abstractmethod
    def delete_below(self, folder: str) -> None:
        """Removes a folder and everything in it; one that is not there is fine."""

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """Names of what is directly in a folder, half-written objects left out; none if there is no such folder."""

    @abstractmethod
    def used(self) -> int:
        """Bytes of all objects."""

    @abstractmethod
    def zarr(self, folder: str, *, read_only: bool) -> Store:
        """A folder as zarr sees it."""

    def settle(self, key: str) -> None:  # noqa: B027, only files need it
        """Makes an object that another library wrote survive a power cut."""

    def stamp(self, key: str) -> object:
        """Another value where an object was written again, as far as that can be told without reading it.

        Of an object store it is always the same: asking would cost as much as reading.
        """
        del key
        return ()

    def sweep(self, keys: Iterable[str]) -> None:  # noqa: B027, only files need it
        """Removes what killed writers of these objects left half-written."""

    def probe(self) -> None:
        """Writes an object and removes it again.

        Raises:
            StoreError: if that is not allowed.
        """
        key = f".probe-{secrets.token_hex(4)}"
        try:
            self.write(key, b"", durable=False)
            self.delete(key)
        except Exception as error:  # object stores refuse with errors of their own
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise StoreError(
                f"{self.url}: cannot be written to ({reason}); expected a place that is not read-only. Choose another, "
                "or open the store for reading"
            ) from error
