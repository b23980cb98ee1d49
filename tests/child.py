"""A process for tests of what may end the process that uses it, as Ray does with one whose cluster is gone."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import Any, ParamSpec, TypeVar

import pytest

psutil = pytest.importorskip("psutil")

P = ParamSpec("P")
T = TypeVar("T")

#: Seconds that a call may take, and those that the process has to end by itself.
CALL, FAREWELL = 600, 20

_SPAWN = multiprocessing.get_context("spawn")


class Child:
    """Calls functions in a process of its own; what becomes of the process after an answer fails nothing.

    A process that was lost since the last answer is replaced by a new one.

    Args:
        surroundings: entered by the process before its first call, left after its last.
        timeout: seconds that a call may take, a start of the process included.
    """

    def __init__(self, surroundings: Callable[[], AbstractContextManager[None]], timeout: float = CALL) -> None:
        self._surroundings = surroundings
        self._timeout = timeout
        self._start()

    def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What the function of some module returns; the test fails with its traceback, or if there is no answer."""
        if not self._process.is_alive():
            self._kill()
            self._start()
        try:
            returned, error = self._exchange(function, args, kwargs)
        except BaseException:  # an answer that comes later would be taken for that of the next call
            self._kill()
            raise
        if error is not None:
            pytest.fail(f"{function.__name__} failed in its process:\n{error}", pytrace=False)
        return returned

    def end(self) -> None:
        """Has the process leave its surroundings; how it ends does not matter."""
        self._connection.close()
        self._process.join(FAREWELL)
        self._kill()

    def _start(self) -> None:
        self._connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, self._surroundings), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is seen here

    def _exchange(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, str | None]:
        with contextlib.suppress(OSError):  # its end is told below
            self._connection.send((function, args, kwargs))
        if not self._connection.poll(self._timeout):
            pytest.fail(f"{function.__name__} gave no answer within {self._timeout:g} s", pytrace=False)
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            self._process.join(FAREWELL)
            code = self._process.exitcode
            pytest.fail(f"{function.__name__} gave no answer: its process ended with exit code {code}", pytrace=False)

    def _kill(self) -> None:
        """Ends the process and all that it started: they share a session, also those whose parents are gone."""
        self._connection.close()
        left = [process for process in psutil.process_iter() if _session(process.pid) == self._process.pid]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.kill()  # if it has no session yet
        self._process.join()
        psutil.wait_procs(left, timeout=FAREWELL)


def _session(pid: int) -> int | None:
    with contextlib.suppress(OSError):  # gone, or not ours
        return os.getsid(pid)


def _serve(connection: Connection, surroundings: Callable[[], AbstractContextManager[None]]) -> None:
    os.setsid()
    with surroundings(), contextlib.suppress(EOFError):  # the end of the calls
        while True:
            _answer(connection, *connection.recv())


def _answer(connection: Connection, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    try:
        connection.send((function(*args, **kwargs), None))
    except BaseException:  # those of pytest are no Exceptions
        connection.send((None, traceback.format_exc()))
