"""The local engine: shards of a data set are fitted in one process, while threads decode and write.

With an accelerator, rendering and solving also overlap the forward passes; on a CPU they would compete for its cores.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from denoising_vit.artifact import artifact_digest
from denoising_vit.backbones.recorded import describe
from denoising_vit.data import Dataset, Skipped
from denoising_vit.decomposition.stage_one import Done, Failed, Ready, StageOne, finish_together
from denoising_vit.errors import FieldError, PhotoError
from denoising_vit.fit.options import FitOptions
from denoising_vit.store import FeatureStore, Manifest, ShardWriter
from denoising_vit.views.patch_grid import patch_centres
from denoising_vit.views.sampling import sample_field

#: Called with the index of a photo, and None or the reason for skipping it.
OnPhoto = Callable[[int, str | None], None]

#: Maximum number of groups of photos waiting to be written, and of shards to seal at once.
_WAITING = 2

#: Number of photos that an accelerator solves at once; each takes 40 MB until then.
_SOLVED = 8

#: Seconds until photos kept in memory for their shard are staged on disk.
_HELD = 1.0


def manifest_of(stage: StageOne, options: FitOptions) -> Manifest:
    """Settings of a store for these results."""
    return Manifest(
        backbone=describe(stage.backbone),
        plan=stage.fitted.digest,
        options=stage.options.recorded("shape", "nothing")
        | {"artifact": artifact_digest(stage.artifact), "grid": options.grid},
        size=stage.fitted.size,
        patch_size=stage.backbone.patch_size,
        stride=stage.backbone.stride,
        grid=stage.fitted.grid,
        field=stage.fitted.resolution if options.grid == "field" else stage.fitted.grid,
        channels=stage.backbone.embed_dim,
        dtype=options.precision,
        images_per_shard=options.images_per_shard,
    )


@dataclass
class LocalRun:
    """A run over unfinished shards of a store, with one thread for each stage."""

    dataset: Dataset
    store: FeatureStore
    decoders: int = 2  #: number of threads per stage that read and decode
    strict: bool = False  #: stop at the first unusable photo, without recording it as failed
    on_photo: OnPhoto = lambda _index, _reason: None  #: called once per photo, by one thread at a time
    _stopped: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fit(self, stages: Sequence[StageOne], shards: Iterable[int]) -> None:
        """Fit the remaining photos of shards, with the solver on each device.

        Raises:
            PhotoError: if strict, and a photo is unusable.
            StoreError: if another process writes a shard.
            OSError: if the store cannot be written to; finished photos are kept.
        """
        waiting = iter(list(shards))
        if len(stages) == 1:
            self._fit(stages[0], waiting)
            return
        threads = torch.get_num_threads()  # the setting is per thread
        with ThreadPoolExecutor(len(stages), "stage", torch.set_num_threads, (threads,)) as pool:
            jobs = [pool.submit(self._fit, stage, waiting) for stage in stages]
            for job in jobs:
                job.add_done_callback(self._stop_on_error)
            try:
                for job in jobs:
                    job.result()
            finally:
                self._stopped.set()

    def _fit(self, stage: StageOne, shards: Iterator[int]) -> None:
        with _Writers(self, hold=not stage.on_cpu) as writers, ThreadPoolExecutor(1, "write") as pool:
            pending: collections.deque[Future[None]] = collections.deque()
            photos = self._photos(writers.open_shards(shards))
            # Closing the results stops the rendering and reading threads.
            with contextlib.closing(_together(stage.run(photos), 1 if stage.on_cpu else _SOLVED)) as groups:
                for group in groups:
                    if stage.on_cpu:
                        group = _solved(group)
                    pending.append(pool.submit(writers.write, group))
                    while len(pending) > _WAITING:
                        pending.popleft().result()
                    if self._stopped.is_set():
                        break
            pending.append(pool.submit(writers.wait))
            for job in pending:
                job.result()

    def _photos(self, indices: Iterator[int]) -> Iterator[tuple[int, str, np.ndarray | Skipped]]:
        for index, pixels in self.dataset.stream(indices, workers=self.decoders, ahead=2 * self.decoders):
            yield index, self.dataset[index].id, pixels

    def _stop_on_error(self, job: Future[None]) -> None:
        if job.cancelled() or job.exception() is not None:
            self._stopped.set()

    def next_of(self, shards: Iterator[int]) -> int | None:
        """The next shard for the calling thread; None at the end."""
        with self._lock:
            return next(shards, None)

    def report(self, index: int, reason: str | None) -> None:
        """Call ``on_photo``."""
        with self._lock:
            self.on_photo(index, reason)


@dataclass
class _OpenShard:
    """A shard being written."""

    writer: ShardWriter
    leases: contextlib.ExitStack  #: closes the writer
    left: int  #: number of photos that are not written yet
    #: Photos not reported yet (in memory, or failed): index, and the reason of a failure.
    unreported: list[tuple[int, str | None]] = field(default_factory=list)
    since: float = 0.0  #: time of the first of these photos


class _Writers:
    """The shards that one stage writes, each open from reading its first photo to writing its last one.

    With ``hold``, photos are kept in memory, so that a shard completed within :data:`_HELD` seconds is written only
    once, in the background. Photos are reported once they are on disk.
    """

    def __init__(self, run: LocalRun, *, hold: bool) -> None:
        self._run, self._hold = run, hold
        self._open: dict[int, _OpenShard] = {}
        self._seal = ThreadPoolExecutor(_WAITING, "seal")
        self._sealing: collections.deque[tuple[Future[None], _OpenShard]] = collections.deque()

    def __enter__(self) -> _Writers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seal.shutdown()  # before the leases end, because sealing needs them
        every = contextlib.ExitStack()  # releases the other leases even if one fails
        for shard in list(self._open):
            every.push(self._open.pop(shard).leases)
        every.__exit__(kind, error, trace)

    def open_shards(self, shards: Iterator[int]) -> Iterator[int]:
        """The remaining photos of shards; each shard is leased when its first photo is due."""
        while (shard := self._run.next_of(shards)) is not None:
            with contextlib.ExitStack() as stack:
                writer = stack.enter_context(self._run.store.writer(shard))
                todo = writer.missing()
                self._open[shard] = _OpenShard(writer, stack.pop_all(), len(todo))
            if not todo:
                self._close(self._open.pop(shard))
            yield from todo

    def write(self, group: Sequence[Ready | Done | Failed]) -> None:
        """Store photos, after solving them if necessary, or record why they failed; see :meth:`LocalRun.fit`."""
        for result in _solved(group):
            self._write(result)
        for opened in list(self._open.values()):
            if opened.unreported and time.monotonic() - opened.since > _HELD:
                opened.writer.flush()
                self._report(opened)

    def wait(self) -> None:
        """Wait until all complete shards are sealed."""
        while self._sealing:
            self._sealed()

    def _sealed(self) -> None:
        """Wait for the first shard being sealed in the background, and report its photos."""
        job, opened = self._sealing.popleft()
        job.result()
        self._report(opened)

    def _write(self, result: Done | Failed) -> None:
        shard = self._run.store.manifest.shard_of(result.index)
        opened = self._open[shard]
        failed = result if isinstance(result, Failed) else self._store(result, opened)
        if failed is not None and self._run.strict:
            raise PhotoError(f"{failed.name}: {failed.reason}")
        if failed is not None and failed.final:
            opened.writer.fail(failed.index, failed.reason)
        opened.since = opened.since if opened.unreported else time.monotonic()
        opened.unreported.append((result.index, None if failed is None else failed.reason))
        opened.left -= 1
        if not opened.left:
            self._open.pop(shard)
            if self._hold:
                self._sealing.append((self._seal.submit(self._close, opened), opened))
            else:
                self._close(opened)
        if not self._hold:
            self._report(opened)
        while len(self._sealing) > _WAITING or (self._sealing and self._sealing[0][0].done()):
            self._sealed()

    def _store(self, done: Done, opened: _OpenShard) -> Failed | None:
        """Store a photo, or return the failure."""
        try:
            nodes = resampled(done.field, self._run.store.manifest.field)
            (opened.writer.hold if self._hold else opened.writer.put)(done.index, nodes, done.record)
        except FieldError as error:
            return Failed(done.index, done.name, str(error).removeprefix(f"{done.name}: "))
        return None

    def _close(self, opened: _OpenShard) -> None:
        with opened.leases:
            opened.writer.finish()  # not sealed if a photo was unreachable; a later run retries it

    def _report(self, opened: _OpenShard) -> None:
        for index, reason in opened.unreported:
            self._run.report(index, reason)
        opened.unreported.clear()


def _together(
    results: Generator[Ready | Failed, None, None], count: int
) -> Generator[list[Ready | Failed], None, None]:
    """Group the results; a failure ends its group, so that it is reported immediately."""
    with contextlib.closing(results):
        group: list[Ready | Failed] = []
        for result in results:
            group.append(result)
            if len(group) == count or isinstance(result, Failed):
                yield group
                group = []
        if group:
            yield group


def _solved(group: Sequence[Ready | Done | Failed]) -> list[Done | Failed]:
    """The group in order, with the ready photos solved."""
    ready = [result for result in group if isinstance(result, Ready)]
    solved = iter(finish_together(ready) if len(ready) > 1 else [photo.finish() for photo in ready])
    return [next(solved) if isinstance(result, Ready) else result for result in group]


def resampled(nodes: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resample a field (Ry, Rx, C) bilinearly to the store's nodes, at cell centres."""
    if tuple(nodes.shape[:2]) == shape:
        return nodes
    rows, columns = (patch_centres(count, 1, 1) for count in shape)
    return sample_field(nodes, rows, columns)
