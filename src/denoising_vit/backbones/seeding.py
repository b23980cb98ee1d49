"""Initial values that are the same in every run: torch draws them from a generator that the whole process shares."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_TURN = threading.RLock()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """While it lasts, torch's generator of the CPU draws from this seed; afterwards it goes on where it was.

    One thread at a time: another that built its model meanwhile would take numbers from this one. Libraries that switch
    off initial values while they load a model do so for the whole process, and are run in it for that reason.
    """
    with _TURN, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU alone, which is what is restored
        yield
