"""Items prefetched in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from denoising_vit.progress import prefetched


def workers() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_items_come_in_order() -> None:
    assert list(prefetched(range(50), 3)) == list(range(50))


def test_empty_input_gives_no_items() -> None:
    assert list(prefetched([], 3)) == []


def test_number_of_prefetched_items_is_limited() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    reader = prefetched(items(), 2)
    assert next(reader) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:  # one read, two queued, one waiting to be queued
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 4
    reader.close()


def test_exception_is_raised_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("third")

    reader = prefetched(items(), 5)
    assert [next(reader), next(reader)] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(reader)


def test_closing_early_stops_the_thread_and_closes_the_iterator() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.set()

    reader = prefetched(items(), 1)
    next(reader)
    assert workers() == 1
    reader.close()
    assert workers() == 0
    assert closed.is_set()
