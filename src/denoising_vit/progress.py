"""Progress reporting, and reading ahead in a thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

#: ``progress(done, total)``, called as work proceeds; the total may be an estimate.
OnProgress = Callable[[int, int], None]

#: ``with progress(label, total) as advance:``, then ``advance()`` after each item; the total may be unknown (None).
Progress = Callable[[str, int | None], contextlib.AbstractContextManager[Callable[[], None]]]


@contextlib.contextmanager
def no_progress(_label: str, _total: int | None) -> Iterator[Callable[[], None]]:
    """No-op progress."""
    yield lambda: None


def duration(seconds: float) -> str:
    """A duration in its largest unit, such as "5 min"."""
    for name, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} s"


_END = object()

#: Seconds between checks whether the consumer has stopped.
_POLL = 0.1


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def prefetched(items: Iterable[T], ahead: int) -> Generator[T, None, None]:
    """Yield the items; a background thread produces up to ``ahead`` of them in advance.

    Exceptions of the iterator are raised to the consumer in order. The thread ends when the consumer stops.
    """
    import torch  # imported here, so that a command's progress does not wait for it

    waiting: queue.Queue[object] = queue.Queue(ahead)
    stopped = threading.Event()
    # A new thread adopts torch's number of threads only at its first parallel loop. Sums computed before that would be
    # split differently, and differ in their last bits.
    threads = torch.get_num_threads()

    def put(item: object) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(item, timeout=_POLL)
                return True
        return False

    def work() -> None:
        torch.set_num_threads(threads)
        try:
            if all(put(item) for item in items):
                put(_END)
        except BaseException as error:  # raised again in the consumer's thread
            put(_Raised(error))
        finally:
            close = getattr(items, "close", None)  # a generator must be closed in the thread that ran it
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
