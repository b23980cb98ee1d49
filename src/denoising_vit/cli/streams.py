"""Output of a verb: its exit code, and standard output, which has only JSON lines with ``--json``."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

#: All succeeded; some items failed; invalid command; stopped by the user (128 + SIGINT).
OK, SOME_FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130


class Interrupted(Exception):
    """The user stopped a verb; the message says what is kept."""


@contextlib.contextmanager
def interruptible(note: str) -> Iterator[None]:
    """Convert Ctrl-C in a block to :class:`Interrupted`, which ends the verb with this note."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(note) from None


#: Standard output, while other prints are redirected to standard error.
_for_json: list[TextIO] = []


@contextlib.contextmanager
def only_json() -> Iterator[None]:
    """Let only :func:`print_json` write to standard output in a block; other prints go to standard error."""
    _for_json.append(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _for_json.pop()


def print_json(record: Any) -> None:
    """Print one line of JSON."""
    print(json.dumps(record), file=_for_json[-1] if _for_json else sys.stdout, flush=True)


@contextlib.contextmanager
def logged(show: Callable[[str], None]) -> Iterator[None]:
    """Show log messages of the package in a block."""

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
