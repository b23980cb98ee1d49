"""Leases: exclusive write access to a shard, without relying on synchronized clocks.

A lease is the object ``leases/<name>.<generation>.json``, created exclusively; the highest generation is valid. Taking
over means creating the next generation, which only one contender can do; no contender overwrites the object of another.
(With one object per name, deleted and created again, two contenders that find the same stale lease could both delete
and create it, and the second would delete the object of the first.) A thread of the holder increments a counter in its
object every few seconds.

A lease is free if its holder released it, or if its holder was a process on this machine that has ended. If that is
unknown, it is free if its object does not change while a contender watches it, timed by the contender's own monotonic
clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from denoising_vit.errors import StoreError
from denoising_vit.files import parse_json
from denoising_vit.store.layout import LEASES
from denoising_vit.store.objects import Objects

#: Seconds between two heartbeats.
HEARTBEAT = 5.0

#: Seconds without a heartbeat after which the lease of another machine is considered abandoned.
PATIENCE = 30.0

_PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A process, identified by more than its pid, because pids are reused."""

    host: str  #: host name, for messages
    machine: str | None  #: identifies machine, boot and container; None if unknown
    pid: int
    started: int | None  #: start time in ticks since boot; None if unknown

    @classmethod
    def current(cls) -> Process:
        """The current process."""
        pid = os.getpid()
        status = _status(pid)
        return cls(socket.gethostname(), _machine(), pid, status[1] if status else None)

    def is_same(self, other: Process) -> bool:
        """True if both describe the same process."""
        return (self.machine, self.pid, self.started) == (other.machine, other.pid, other.started)

    def alive(self) -> bool | None:
        """True while the process runs; None if unknown, on another machine or not on Linux."""
        if self.machine is None or self.started is None or self.machine != _machine():
            return None
        try:
            with contextlib.suppress(PermissionError):  # another user's process
                os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        status = _status(self.pid)
        if status is None:
            return None  # it has just ended, or is hidden
        state, started = status
        return started == self.started and state not in "ZX"  # a killed process is a zombie until its parent waits


def _machine() -> str | None:
    """Host, boot and pid namespace; host names alone are not unique among containers."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{(_PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return None


def _status(pid: int) -> tuple[str, int] | None:
    """State and start time of a process: fields 3 and 22 of its ``stat``, after the name, which ends with ``)``."""
    try:
        values = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return values[0], int(values[19])
    except (OSError, IndexError, ValueError):
        return None


@dataclass(frozen=True)
class _Entry:
    """Content of a lease object."""

    holder: Process
    token: str
    beat: int = 0
    released: bool = False

    def encode(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes) -> _Entry | None:
        """Decode; None if the object is damaged, or half-written on a file system without hard links."""
        try:
            content = parse_json(data)
            return cls(**(content | {"holder": Process(**content["holder"])}))
        except (ValueError, TypeError, KeyError):
            return None


class Leases:
    """The leases of a store.

    Leases acquired here have a heartbeat every ``heartbeat`` seconds. Another machine's lease is watched for
    ``patience`` seconds, which are several of its heartbeats.
    """

    def __init__(self, objects: Objects, *, heartbeat: float = HEARTBEAT, patience: float = PATIENCE) -> None:
        self._objects = objects
        self._heartbeat, self._patience = heartbeat, patience
        self._watched: dict[str, tuple[bytes, float]] = {}  # content of other leases, and the time of its last change

    def acquire(self, name: str) -> Lease:
        """Acquire the lease ``name``; waits only if another machine's lease must be watched.

        Raises:
            StoreError: naming the holder's host and process, if it is alive.
        """
        while True:
            generation, data = self.highest(name)
            if data is None or self._is_free(name, generation, data):
                if lease := self._claim(name, generation + 1):
                    return lease
                continue  # another contender was first
            time.sleep(min(self._heartbeat, self._patience) / 4)

    def highest(self, name: str) -> tuple[int, bytes | None]:
        """Generation and content of the valid lease; (0, None) without one."""
        while True:
            generation = max(self.generations(name), default=0)
            if not generation:
                return 0, None
            with contextlib.suppress(FileNotFoundError):  # deleted by the holder of the next generation: retry
                return generation, self._objects.read(_key(name, generation))

    def generations(self, name: str) -> list[int]:
        """Existing generations of a lease."""
        pattern = re.compile(rf"{re.escape(name)}\.(\d+)\.json")
        return [int(match[1]) for match in map(pattern.fullmatch, self._objects.names(LEASES)) if match]

    def _is_free(self, name: str, generation: int, data: bytes) -> bool:
        """True if a lease may be taken over, False if it must be watched longer.

        Raises:
            StoreError: if its holder is alive.
        """
        entry = _Entry.decode(data)
        if entry is not None and entry.released:
            return True
        alive = None if entry is None else entry.holder.alive()
        if alive is False:
            return True
        key, now = _key(name, generation), time.monotonic()
        before, since = self._watched.setdefault(key, (data, now))
        if before != data:
            self._watched[key] = (data, now)
        if alive or before != data:
            holder = f"process {entry.holder.pid} on {entry.holder.host}" if entry else "another process"
            raise StoreError(
                f"{self._objects.url}: {name} is being written by {holder}. Wait for that process or stop it; its "
                "finished images are kept"
            )
        return now - since >= self._patience

    def _claim(self, name: str, generation: int) -> Lease | None:
        entry = _Entry(Process.current(), secrets.token_hex(8))
        key = _key(name, generation)
        if not self._objects.create(key, entry.encode(), durable=False):  # a power failure also ends the holder
            return None
        older = [other for other in self.generations(name) if other != generation]
        # A contender that was suspended may create a generation that was held and deleted long ago. And if a service
        # ignores the condition of a put, the last put wins.
        if max(older, default=0) > generation:
            self._objects.delete(key)
            return None
        if self.highest(name) != (generation, entry.encode()):
            return None
        for other in older:
            self._objects.delete(_key(name, other))
        return Lease(self, self._objects, name, generation, entry, self._heartbeat)


class Lease:
    """A held lease; a ``with`` block releases it."""

    def __init__(
        self, leases: Leases, objects: Objects, name: str, generation: int, entry: _Entry, heartbeat: float
    ) -> None:
        self.name = name
        self._leases, self._objects = leases, objects
        self._generation, self._entry = generation, entry
        self._lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(heartbeat,), name=f"lease {name}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Check in the store that the lease is still valid.

        Raises:
            StoreError: if it was taken over, for example because this process was suspended for long.
        """
        if not self._lost:
            generation, data = self._leases.highest(self.name)
            entry = _Entry.decode(data or b"")
            self._lost = generation != self._generation or entry is None or entry.token != self._entry.token
        self.require()

    def require(self) -> None:
        """Like :meth:`check`, but based on the last heartbeat.

        Raises:
            StoreError: if the lease was taken over.
        """
        if self._lost:
            raise StoreError(
                f"{self._objects.url}: another process took over {self.name} because this process stalled; finished "
                "images are kept. Run the command again to continue"
            )

    def release(self, *, forget: bool = False) -> None:
        """Release the lease; ``forget`` also deletes its object, for a name that is no longer needed."""
        if self._stop.is_set() or not Process.current().is_same(self._entry.holder):  # a forked child is not the holder
            return
        self._stop.set()
        self._thread.join()
        if self._lost:
            return
        key = _key(self.name, self._generation)
        # This must not hide the error that ended the work. On a full disk, deleting still works.
        with contextlib.suppress(Exception):
            if not forget:
                self._objects.write(key, replace(self._entry, released=True).encode(), durable=False)
                return
        with contextlib.suppress(Exception):
            self._objects.delete(key)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.release()

    def _beat(self, seconds: float) -> None:
        while not self._lost and not self._stop.wait(seconds):
            with contextlib.suppress(Exception):  # the network may recover, the disk may get free space
                self.check()
                self._entry = replace(self._entry, beat=self._entry.beat + 1)
                self._objects.write(_key(self.name, self._generation), self._entry.encode(), durable=False)


def _key(name: str, generation: int) -> str:
    return f"{LEASES}/{name}.{generation}.json"
