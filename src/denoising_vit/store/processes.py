"""Processes that can be recognised again: their number alone is given to others after them."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A process of some machine.

    Attributes:
        host: the machine's name, for people.
        machine: tells machines, their boots and containers apart; None where that cannot be told.
        pid: its number there.
        started: when it started, in ticks since boot; None where that cannot be told.
    """

    host: str
    machine: str | None
    pid: int
    started: int | None

    @classmethod
    def current(cls) -> Process:
        """The one that runs this."""
        pid = os.getpid()
        status = _status(pid)
        return cls(socket.gethostname(), _machine(), pid, status[1] if status else None)

    def is_same(self, other: Process) -> bool:
        """Whether both are one process."""
        return (self.machine, self.pid, self.started) == (other.machine, other.pid, other.started)

    def alive(self) -> bool | None:
        """Whether it still runs; None if that cannot be told from here: another machine, or not Linux."""
        if self.machine is None or self.started is None or self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            pass
        status = _status(self.pid)
        if status is None:
            return None  # ended just now, or hidden from us
        state, started = status
        return started == self.started and state not in "ZX"  # a killed one stays as Z until its parent looks


def _machine() -> str | None:
    """Host, boot and process numbering; host names alone repeat among containers."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{(_PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return None


def _status(pid: int) -> tuple[str, int] | None:
    """State and start of a process, fields 3 and 22 of its line; its name, which may hold anything, ends with ``)``."""
    try:
        values = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return values[0], int(values[19])
    except (OSError, IndexError, ValueError):
        return None
