"""How long work says how far it is, without knowing who looks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

#: ``watch(what, how many)`` is a block within which the function that it gives is called after each of them; None
#: where it is not known how many there are.
Watch = Callable[[str, int | None], contextlib.AbstractContextManager[Callable[[], None]]]


@contextlib.contextmanager
def unwatched(_what: str, _total: int | None) -> Iterator[Callable[[], None]]:
    """Nobody looks."""
    yield lambda: None
