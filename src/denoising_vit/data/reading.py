"""A data set: known by name, read when asked, in parallel and in order."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import overload

import numpy as np

from denoising_vit.data.items import Item, Skipped
from denoising_vit.data.photos import read_photo_bytes
from denoising_vit.data.storage import Storage, reason_of
from denoising_vit.errors import PhotoError

#: Refusals of an HTTP server that may be another time: too slow, too early, too often.
_PASSING = (408, 425, 429)


class Dataset(Sequence[Item]):
    """The images of one source, as :func:`open_dataset` found them. It may be pickled and shared between threads.

    Attributes:
        source: as it was given.
        items: sorted by id, those of a text list in the order of the list: the same everywhere.
        skipped: what was found and is no item, with reasons.
    """

    def __init__(self, source: str, items: Iterable[Item], skipped: Iterable[Skipped] = ()) -> None:
        self.source = source
        self.items = tuple(items)
        self.skipped = tuple(skipped)
        self._storage = Storage()

    def __repr__(self) -> str:
        return f"Dataset({self.source!r}: {len(self.items)} items, {len(self.skipped)} skipped)"

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Item, ...]: ...
    def __getitem__(self, index: int | slice) -> Item | tuple[Item, ...]:
        return self.items[index]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the ids in their order; of the names, that is, not of the pictures."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(item.id.encode() + b"\0")
        return digest.hexdigest()

    def read(self, index: int) -> np.ndarray:
        """One image as (H, W, 3) uint8, by the rules of :func:`denoising_vit.data.photos.read_photo`.

        Raises:
            PhotoError: if it cannot be read, naming its id.
        """
        item = self.items[index]
        try:
            content = self._storage.read(item.url, item.start, item.size)
        except Exception as error:  # every service has its own kinds
            raise PhotoError(f"{item.id}: {reason_of(error)}") from error
        try:
            return read_photo_bytes(content, item.id)
        except PhotoError as error:  # what decoding failed on is no reason to try again
            raise PhotoError(str(error)) from None

    def stream(
        self, indices: Iterable[int], *, workers: int = 4, ahead: int = 8, patience: Sequence[float] = ()
    ) -> Iterator[tuple[int, np.ndarray | Skipped]]:
        """Images in the order of ``indices``, read and decoded in threads while the caller works.

        Threads run only between the first image and the last, or the end of the iterator: close it, or let go of it, to
        stop early. ``indices`` may be endless; it is asked for ``ahead`` more than are used.

        Args:
            indices: which, in which order.
            workers: how many threads, at least 1.
            ahead: how many decoded images wait at most, at least 1.
            patience: seconds that are waited before an image is asked for again that cannot be reached, each time.

        Yields:
            The index, and the image as (H, W, 3) uint8 or why there is none.

        Raises:
            IndexError: if an index is out of range.
        """
        if workers < 1 or ahead < 1:
            raise ValueError(f"expected workers and ahead of at least 1, found {workers} and {ahead}")
        return self._stream(indices, workers, ahead, tuple(patience))

    def _stream(
        self, indices: Iterable[int], workers: int, ahead: int, patience: tuple[float, ...]
    ) -> Iterator[tuple[int, np.ndarray | Skipped]]:
        pending: deque[tuple[int, Future[np.ndarray | Skipped]]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="dvit-read")
        try:
            for index in indices:
                pending.append((index, pool.submit(self._read_or_skip, index, patience)))
                if len(pending) > ahead:  # the first of them is handed over, so that `ahead` stay
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read_or_skip(self, index: int, patience: Sequence[float]) -> np.ndarray | Skipped:
        found = self._tried(index)
        for seconds in patience:
            if not (isinstance(found, Skipped) and found.unreachable):
                break
            time.sleep(seconds)
            found = self._tried(index)
        return found

    def _tried(self, index: int) -> np.ndarray | Skipped:
        try:
            return self.read(index)
        except PhotoError as error:
            name = self.items[index].id
            return Skipped(name, str(error).removeprefix(f"{name}: "), unreachable=_may_pass(error.__cause__))


def _may_pass(cause: BaseException | None) -> bool:
    """Whether what kept a file from being read is the way to it, not the file: a network, a drive."""
    status = getattr(cause, "status", None)  # of an HTTP answer
    if isinstance(status, int) and 400 <= status < 500 and status not in _PASSING:
        return False
    lasting = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, PhotoError, ValueError)
    return isinstance(cause, Exception) and not isinstance(cause, lasting)
