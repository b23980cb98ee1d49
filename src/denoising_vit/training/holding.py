"""Who writes a folder of training: one run at a time, on whatever machine."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from denoising_vit.errors import StoreError, TrainError
from denoising_vit.store.layout import LEASES
from denoising_vit.store.leases import Lease, Leases
from denoising_vit.store.local import LocalObjects

#: The hidden folder in which it is noted.
HOLDING = ".held"

_HELD: dict[tuple[Path, str], Lease] = {}


def hold(folder: Path, name: str) -> None:
    """Keeps other processes from writing a folder, until this one ends or :func:`let_go` is called.

    Raises:
        TrainError: naming the process that writes it.
        OSError: if the folder cannot be written to.
    """
    key = folder.resolve(), name
    if key in _HELD:
        with suppress(StoreError):  # the folder was removed since, and made anew
            _HELD[key].check()
            return
        let_go(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _HELD[key] = Leases(LocalObjects(folder / HOLDING)).acquire(name)
    except StoreError as error:
        raise TrainError(f"{folder}: another run writes it ({error})") from error
    atexit.register(let_go, folder, name)


def let_go(folder: Path, name: str) -> None:
    """Lets other processes write it."""
    lease = _HELD.pop((folder.resolve(), name), None)
    if lease is not None:
        lease.release(forget=True)
        with suppress(OSError):  # others note there that they hold something else
            for empty in (folder / HOLDING / LEASES, folder / HOLDING):
                empty.rmdir()


@contextmanager
def held(folder: Path, name: str) -> Iterator[None]:
    """As :func:`hold`, for as long as the block lasts."""
    hold(folder, name)
    try:
        yield
    finally:
        let_go(folder, name)
