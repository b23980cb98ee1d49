"""Progress reporting, and reading ahead."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

import torch

#: ``watch(what, how many)`` is a block within which the function that it gives is called after each of them; None
#: where it is not known how many there are.
Watch = Callable[[str, int | None], contextlib.AbstractContextManager[Callable[[], None]]]


@contextlib.contextmanager
def unwatched(_what: str, _total: int | None) -> Iterator[Callable[[], None]]:
    """Nobody looks."""
    yield lambda: None


T = TypeVar("T")

_END = object()

#: Seconds between two looks whether the reader has gone.
_LOOK = 0.1


def prefetched(items: Iterable[T], ahead: int) -> Generator[T, None, None]:
    """The same items, made in a thread of their own, at most ``ahead`` of them waiting.

    An exception in the iterator reaches the reader at its place. A reader that stops early stops the thread.
    """
    waiting: queue.Queue[object] = queue.Queue(ahead)
    stopped = threading.Event()
    # Torch's setting reaches a new thread with its first parallel loop, not before: sums taken earlier would be split
    # among another number of threads, and differ in their last bits.
    threads = torch.get_num_threads()

    def put(item: object) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=_LOOK)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        torch.set_num_threads(threads)
        try:
            for item in items:
                if not put(item):
                    return
            put(_END)
        except BaseException as error:  # carried over to the reader's thread
            put(_Raised(error))
        finally:
            close = getattr(items, "close", None)  # a generator's clean-up belongs to the thread that ran it
            if close is not None:
                close()

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not _END:
            if isinstance(item, _Raised):
                raise item.error
            yield item  # pyright: ignore[reportReturnType]
    finally:
        stopped.set()
        thread.join()


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error
