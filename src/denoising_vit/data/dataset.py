"""Data sets of images, read and decoded in parallel and in order."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np

from denoising_vit.data.photos import read_photo_bytes
from denoising_vit.data.storage import Storage, reason_of
from denoising_vit.errors import PhotoError


@dataclass(frozen=True)
class Skipped:
    """A data set entry that could not be used."""

    item: str  #: name of the entry
    reason: str  #: reason for skipping it, as shown to users
    unreachable: bool = False  #: True if its storage did not respond, so that a retry may succeed


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a data set, not yet read."""

    #: Unique within the data set and the same on every machine: the path below the source with ``/`` as separator;
    #: ``<shard>/<member>`` for tar shards; the line for a text list.
    id: str
    url: str  #: absolute path or fsspec address of the file or tar shard
    start: int | None = None  #: offset of the member in its shard
    size: int | None = None  #: size of the member in its shard, in bytes


#: Client errors of HTTP for which a retry may succeed: timeout, too early, too many requests.
_PASSING = (408, 425, 429)


class Dataset(Sequence[Item]):
    """The images of one source, as found by :func:`open_dataset`. It can be pickled and shared between threads.

    Attributes:
        source: the source, as given by the user.
        items: images sorted by id; for a text list, in the list's order.
        skipped: unusable entries, with reasons.
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
        """SHA-256 of the ids in order; independent of the pixels."""
        return hashlib.sha256(b"".join(item.id.encode() + b"\0" for item in self.items)).hexdigest()

    def read(self, index: int) -> np.ndarray:
        """Read one image as (H, W, 3) uint8; see :func:`denoising_vit.data.photos.read_photo`.

        Raises:
            PhotoError: if it cannot be read, naming its id.
        """
        item = self.items[index]
        try:
            content = self._storage.read(item.url, item.start, item.size)
        except Exception as error:  # every service has its own exceptions
            raise PhotoError(f"{item.id}: {reason_of(error)}") from error
        try:
            return read_photo_bytes(content, item.id)
        except PhotoError as error:  # without a cause: a retry would not help
            raise PhotoError(str(error)) from None

    def stream(
        self, indices: Iterable[int], *, workers: int = 4, ahead: int = 8, patience: Sequence[float] = ()
    ) -> Iterator[tuple[int, np.ndarray | Skipped]]:
        """Yield images in the order of ``indices``; threads read and decode them in advance.

        The threads end with the iterator; close it to stop early. ``indices`` may be endless.

        Args:
            indices: indices of the images.
            workers: number of threads, at least 1.
            ahead: maximum number of decoded images in the queue, at least 1.
            patience: seconds to wait before each retry of an unreachable image.

        Yields:
            The index, and the image as (H, W, 3) uint8 or the reason for skipping it.

        Raises:
            IndexError: if an index is out of range.
        """
        if workers < 1 or ahead < 1:
            raise ValueError(f"expected workers and ahead of at least 1, got {workers} and {ahead}")
        return self._stream(indices, workers, ahead, tuple(patience))

    def _stream(
        self, indices: Iterable[int], workers: int, ahead: int, patience: tuple[float, ...]
    ) -> Iterator[tuple[int, np.ndarray | Skipped]]:
        pending: deque[tuple[int, Future[np.ndarray | Skipped]]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="dvit-read")
        try:
            for index in indices:
                pending.append((index, pool.submit(self._read_or_skip, index, patience)))
                if len(pending) > ahead:
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
    """True for errors of a network or drive, which a retry may fix; False for errors of the file itself."""
    status = getattr(cause, "status", None)  # HTTP status
    if isinstance(status, int) and 400 <= status < 500 and status not in _PASSING:
        return False
    lasting = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, PhotoError, ValueError)
    return isinstance(cause, Exception) and not isinstance(cause, lasting)


#: Number of decoding threads for callers that run a model on the same CPU cores.
_DECODERS = 2


def spread(count: int, wanted: int) -> list[int]:
    """Indices of ``wanted`` of ``count`` items, spread evenly because neighbours are often similar; 0 for all."""
    if wanted == 0 or wanted >= count:
        return list(range(count))
    return [int((number + 0.5) * count / wanted) for number in range(wanted)]


def named_photos(dataset: Dataset, indices: list[int]) -> Iterator[tuple[str, np.ndarray | Skipped]]:
    """Yield ids and pixels (H, W, 3) uint8 of photos, or the reason for skipping them; decoded in advance."""
    for index, pixels in dataset.stream(indices, workers=_DECODERS, ahead=2 * _DECODERS):
        yield dataset[index].id, pixels
