"""Photos and what is known of them, read once before the work begins: what can be used, and what cannot and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from denoising_vit.data import Skipped
from denoising_vit.errors import EvaluationError, PhotoError

#: Decoding releases Python's lock; more threads than this gain little and hold more photos in memory.
_THREADS = 4

#: How many names of a folder a message shows.
_SHOWN = 8


class Unread(Protocol):
    """A photo that is known by its name."""

    @property
    def id(self) -> str:
        """What messages call it."""
        ...

    @property
    def photo(self) -> Path:
        """Its file."""
        ...


Item = TypeVar("Item", bound=Unread)
Found = TypeVar("Found")


def inspect_all(
    inspect_one: Callable[[Item], Found | Skipped], items: Sequence[Item], progress: Callable[[], None] | None
) -> tuple[list[Found], list[Skipped]]:
    """Inspects photos in a few threads, in their order.

    Args:
        inspect_one: reads one; what it says or raises (PhotoError, EvaluationError, OSError) is why it is skipped.
        items: the photos.
        progress: called after each.

    Returns:
        What was found of those that can be used, and the others.
    """

    def inspected(item: Item) -> Found | Skipped:
        try:
            return inspect_one(item)
        except PhotoError as error:
            return Skipped(item.id, str(error).removeprefix(f"{item.photo}: "))  # the id names the photo already
        except (EvaluationError, OSError) as error:
            return Skipped(item.id, str(error))

    usable: list[Found] = []
    failed: list[Skipped] = []
    pool = ThreadPoolExecutor(_THREADS, "inspect")
    try:
        for found in pool.map(inspected, items):
            if isinstance(found, Skipped):
                failed.append(found)
            else:
                usable.append(found)
            if progress is not None:
                progress()
    finally:
        pool.shutdown(cancel_futures=True)  # whoever interrupts does not wait for the rest
    return usable, failed


def visible(folder: Path) -> list[Path]:
    """What is in a folder and not hidden."""
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def listed(folder: Path) -> str:
    """What is in a folder, in words."""
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in visible(folder))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN]) or 'an empty folder'}{more}"
