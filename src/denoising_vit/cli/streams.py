"""What goes to standard output: with ``--json`` lines of JSON alone, whatever a library prints."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

#: Standard output while everything else that is printed goes to standard error.
_for_json: list[TextIO] = []


@contextlib.contextmanager
def only_json() -> Iterator[None]:
    """For as long as a block lasts, only :func:`print_json` reaches standard output; other prints go to the error."""
    _for_json.append(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _for_json.pop()


def print_json(record: Any) -> None:
    """Prints one line of JSON."""
    print(json.dumps(record), file=_for_json[-1] if _for_json else sys.stdout, flush=True)


@contextlib.contextmanager
def logged(show: Callable[[str], None]) -> Iterator[None]:
    """For as long as a block lasts, what the package logs is shown."""

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            show(record.getMessage())

    logger, handler = logging.getLogger("denoising_vit"), Shown()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
