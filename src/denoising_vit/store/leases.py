"""Leases: who may write a shard, decided without a clock that others could set.

A lease is an object that is created exclusively, ``leases/<name>.<generation>.json``; whoever has the highest
generation holds it. Taking over means creating the next generation, which succeeds for one contender only, and nobody
ever overwrites another's object. (One object per name, deleted and created again, would not do: two contenders that
find the same stale lease could both delete and create, the second deleting the first's.) The holder's thread raises a
counter in its own object every few seconds.

A lease is free if its holder released it, if its process is gone from this machine, or, where that cannot be told, if
its object does not change while the contender watches it by its own monotonic clock.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import threading
import time
from dataclasses import asdict, dataclass, replace
from types import TracebackType

from denoising_vit.errors import StoreError
from denoising_vit.store.layout import LEASES
from denoising_vit.store.objects import Objects
from denoising_vit.store.processes import Process

#: Seconds between two heartbeats.
HEARTBEAT = 5.0

#: Seconds for which a lease of another machine is watched before it counts as abandoned.
PATIENCE = 30.0


@dataclass(frozen=True)
class _Entry:
    """What a lease object says."""

    holder: Process
    token: str
    beat: int = 0
    released: bool = False

    def encode(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes) -> _Entry | None:
        """None for an object that says nothing: half-written by a file system without hard links, or damaged."""
        try:
            content = json.loads(data)
            return cls(**(content | {"holder": Process(**content["holder"])}))
        except (ValueError, TypeError, KeyError):
            return None


class Leases:
    """The leases of a store.

    Args:
        objects: the store's.
        heartbeat: seconds between two heartbeats of leases taken here.
        patience: seconds to watch a lease of another machine; several of its heartbeats.
    """

    def __init__(self, objects: Objects, *, heartbeat: float = HEARTBEAT, patience: float = PATIENCE) -> None:
        self._objects = objects
        self._heartbeat, self._patience = heartbeat, patience
        self._watched: dict[str, tuple[bytes, float]] = {}  # what each foreign lease said, and since when it does

    def acquire(self, name: str) -> Lease:
        """Takes the lease ``name``, waiting only where another machine's lease must be watched.

        Raises:
            StoreError: naming the holder's host and process, if there is a live one.
        """
        while True:
            generation, data = self.highest(name)
            if data is None or self._is_free(name, generation, data):
                lease = self._claim(name, generation + 1)
                if lease is not None:
                    return lease
                continue  # another was faster: see who it is
            time.sleep(min(self._heartbeat, self._patience) / 4)

    def highest(self, name: str) -> tuple[int, bytes | None]:
        """Generation and content of the lease that counts; (0, None) if there is none."""
        while True:
            generation = max(self.generations(name), default=0)
            if not generation:
                return 0, None
            with contextlib.suppress(FileNotFoundError):  # deleted by the next one's holder: look again
                return generation, self._objects.read(_key(name, generation))

    def generations(self, name: str) -> list[int]:
        """Which generations of a lease exist."""
        pattern = re.compile(rf"{re.escape(name)}\.(\d+)\.json")
        return [int(match[1]) for match in map(pattern.fullmatch, self._objects.names(LEASES)) if match]

    def _is_free(self, name: str, generation: int, data: bytes) -> bool:
        """Whether a lease may be taken over; False: watch it further.

        Raises:
            StoreError: if its holder is alive.
        """
        entry = _Entry.decode(data)
        if entry is not None and entry.released:
            return True
        alive = None if entry is None else entry.holder.alive()
        if alive is not None:
            if alive:
                raise self._refusal(name, entry)
            return True
        key, now = _key(name, generation), time.monotonic()
        before, since = self._watched.setdefault(key, (data, now))
        if before != data:  # its heart beats
            self._watched[key] = (data, now)
            raise self._refusal(name, entry)
        return now - since >= self._patience

    def _claim(self, name: str, generation: int) -> Lease | None:
        entry = _Entry(Process.current(), secrets.token_hex(8))
        key = _key(name, generation)
        if not self._objects.create(key, entry.encode()):
            return None
        older = [other for other in self.generations(name) if other != generation]
        # A contender that slept may come to a generation that was held, and cleared away, long ago. And where a
        # service takes every put for a conditional one, the last one counts.
        if max(older, default=0) > generation:
            self._objects.delete(key)
            return None
        if self.highest(name) != (generation, entry.encode()):
            return None
        for other in older:
            self._objects.delete(_key(name, other))
        return Lease(self, self._objects, name, generation, entry, self._heartbeat)

    def _refusal(self, name: str, entry: _Entry | None) -> StoreError:
        holder = f"process {entry.holder.pid} on {entry.holder.host}" if entry else "another process"
        return StoreError(
            f"{self._objects.url}: {name} is being written by {holder}. Wait for it to end, or end it; what it has "
            "finished is kept"
        )


class Lease:
    """A lease that is held, until the block ends."""

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
        """Asks the store whether the lease is still held.

        Raises:
            StoreError: if it was taken over, as happens to a process that stood still for long.
        """
        if not self._lost:
            generation, data = self._leases.highest(self.name)
            entry = _Entry.decode(data or b"")
            self._lost = generation != self._generation or entry is None or entry.token != self._entry.token
        self.require()

    def require(self) -> None:
        """As :meth:`check`, by what the last heartbeat saw.

        Raises:
            StoreError: if the lease was taken over.
        """
        if self._lost:
            raise StoreError(
                f"{self._objects.url}: this process stood still for so long that another took over {self.name}; what "
                "was finished is kept. Start again to go on with the rest"
            )

    def release(self, *, forget: bool = False) -> None:
        """Ends the lease; ``forget`` removes its object, for a name that nobody needs again."""
        if self._stop.is_set() or not Process.current().is_same(self._entry.holder):  # a forked child does not hold it
            return
        self._stop.set()
        self._thread.join()
        if self._lost:
            return
        key = _key(self.name, self._generation)
        # Never hides the error that ended the work. A full disk cannot note the release, but it can delete.
        with contextlib.suppress(Exception):
            if not forget:
                self._objects.write(key, replace(self._entry, released=True).encode(), durable=False)
                return
        with contextlib.suppress(Exception):
            self._objects.delete(key)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _beat(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            with contextlib.suppress(Exception):  # a network that comes back, a disk that has room again
                try:
                    self.check()
                except StoreError:
                    return
                self._entry = replace(self._entry, beat=self._entry.beat + 1)
                self._objects.write(_key(self.name, self._generation), self._entry.encode(), durable=False)


def _key(name: str, generation: int) -> str:
    return f"{LEASES}/{name}.{generation}.json"
