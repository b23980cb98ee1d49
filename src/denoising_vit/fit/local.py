"""Fitting shards of a data set in this process: decoding and writing overlap the forward passes.

Rendering and solving do so as well where an accelerator does the forward passes; on a CPU they would share its cores.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from denoising_vit.data import Dataset, Skipped
from denoising_vit.decomposition.stage_one import Done, Failed, Ready, StageOne, finish_together
from denoising_vit.errors import FieldError, PhotoError
from denoising_vit.store import FeatureStore, ShardWriter
from denoising_vit.views.patch_grid import patch_centres
from denoising_vit.views.sampling import sample_field

#: Called with the index of a photo and None, or why it was not done.
OnPhoto = Callable[[int, str | None], None]

#: Groups of photos that wait to be solved and written while the next are seen.
_WAITING = 2

#: Photos that an accelerator solves at once; each takes 40 MB until then.
_SOLVED = 8


@dataclass
class LocalRun:
    """Unfinished shards of a store, and the threads that finish them: one for each stage.

    Attributes:
        dataset: where the photos are.
        store: where the results go.
        decoders: threads that read and decode, for each stage.
        strict: stop at the first photo that cannot be used; it is not recorded as failed then.
        on_photo: called after each photo, by one thread at a time.
    """

    dataset: Dataset
    store: FeatureStore
    decoders: int = 2
    strict: bool = False
    on_photo: OnPhoto = lambda _index, _reason: None
    _stopped: threading.Event = field(default_factory=threading.Event)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def fit(self, stages: Sequence[StageOne], shards: Iterable[int]) -> None:
        """Fits the unfinished photos of shards.

        Args:
            stages: equal but for their device.
            shards: which; what is finished in them costs nothing.

        Raises:
            PhotoError: if strict, and a photo cannot be used.
            StoreError: if a shard is being written by someone else.
            OSError: if the store cannot be written to; what is finished stays.
        """
        waiting = iter(list(shards))
        if len(stages) == 1:
            self._fit(stages[0], waiting)
            return
        threads = torch.get_num_threads()  # a new thread would begin with its own number
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
        with _Writers(self) as writers, ThreadPoolExecutor(1, "write") as pool:
            pending: collections.deque[Future[None]] = collections.deque()
            photos = self._photos(writers.open_shards(shards))
            # Closing the results stops the threads that render and read.
            with contextlib.closing(_together(stage.run(photos), 1 if stage.on_cpu else _SOLVED)) as groups:
                for group in groups:
                    if stage.on_cpu:
                        group = _solved(group)
                    pending.append(pool.submit(writers.write, group))
                    while len(pending) > _WAITING:
                        pending.popleft().result()
                    if self._stopped.is_set():
                        break
            for job in pending:
                job.result()

    def _photos(self, indices: Iterator[int]) -> Iterator[tuple[int, str, np.ndarray | Skipped]]:
        for index, pixels in self.dataset.stream(indices, workers=self.decoders, ahead=2 * self.decoders):
            yield index, self.dataset[index].id, pixels

    def _stop_on_error(self, job: Future[None]) -> None:
        if job.cancelled() or job.exception() is not None:
            self._stopped.set()

    def next_of(self, shards: Iterator[int]) -> int | None:
        """The next shard for whichever thread asks; None when there is none."""
        with self._turn:
            return next(shards, None)

    def report(self, index: int, reason: str | None) -> None:
        """Passes on what became of a photo."""
        with self._turn:
            self.on_photo(index, reason)


@dataclass
class _OpenShard:
    writer: ShardWriter
    leases: contextlib.ExitStack
    left: int


class _Writers:
    """The shards that one stage writes: open from when their first photo is read until their last one is written."""

    def __init__(self, run: LocalRun) -> None:
        self._run = run
        self._open: dict[int, _OpenShard] = {}
        self._stage = ThreadPoolExecutor(_SOLVED, "stage")

    def __enter__(self) -> _Writers:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stage.shutdown()  # before the leases: what is being staged still needs them
        for shard in list(self._open):
            self._open.pop(shard).leases.close()

    def open_shards(self, shards: Iterator[int]) -> Iterator[int]:
        """The unfinished photos of shards, whose leases are taken as they come."""
        while (shard := self._run.next_of(shards)) is not None:
            with contextlib.ExitStack() as stack:
                writer = stack.enter_context(self._run.store.writer(shard))
                todo = writer.missing()
                self._open[shard] = _OpenShard(writer, stack.pop_all(), len(todo))
            if not todo:
                self._close(shard)
            yield from todo

    def write(self, group: Sequence[Ready | Done | Failed]) -> None:
        """Stores photos, solved first if they are not yet, or records why not.

        Raises:
            PhotoError: if strict, and a photo cannot be used.
        """
        results = _solved(group)
        # Staging one photo is mostly waiting, for a disk or an answer: those of a group wait together.
        stored = self._stage.map(self._staged, results) if len(results) > 1 else map(self._staged, results)
        for result, failed in zip(results, stored, strict=True):
            self._note(result, failed)

    def _staged(self, result: Done | Failed) -> Failed | None:
        """Stores a photo; why not, if it cannot be."""
        if isinstance(result, Failed):
            return result
        return self._store(result, self._open[self._run.store.manifest.shard_of(result.index)].writer)

    def _note(self, result: Done | Failed, failed: Failed | None) -> None:
        """Tells what became of a photo, and seals its shard if it was the last of it."""
        shard = self._run.store.manifest.shard_of(result.index)
        if failed is not None and self._run.strict:
            raise PhotoError(f"{failed.name}: {failed.reason}")
        if failed is not None and failed.final:
            self._open[shard].writer.fail(failed.index, failed.reason)
        self._open[shard].left -= 1
        if not self._open[shard].left:
            self._close(shard)
        self._run.report(result.index, None if failed is None else failed.reason)

    def _store(self, done: Done, writer: ShardWriter) -> Failed | None:
        try:
            writer.put(done.index, resampled(done.field, self._run.store.manifest.field), done.record)
        except FieldError as error:
            return Failed(done.index, done.name, str(error).removeprefix(f"{done.name}: "))
        return None

    def _close(self, shard: int) -> None:
        opened = self._open.pop(shard)
        with opened.leases:
            opened.writer.finish()  # not if a photo could not be reached: the shard stays open for it


def _together(
    results: Generator[Ready | Failed, None, None], count: int
) -> Generator[list[Ready | Failed], None, None]:
    """The same results in groups; one that failed ends its group, so that its reason does not wait."""
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
    """The same in their order, with the photos that are ready solved."""
    ready = [result for result in group if isinstance(result, Ready)]
    solved = iter(finish_together(ready) if len(ready) > 1 else [photo.finish() for photo in ready])
    return [next(solved) if isinstance(result, Ready) else result for result in group]


def resampled(nodes: Tensor, shape: tuple[int, int]) -> Tensor:
    """A field (Ry, Rx, C) on as many nodes as the store keeps, bilinear at their cell centres."""
    if tuple(nodes.shape[:2]) == shape:
        return nodes
    rows, columns = (patch_centres(count, 1, 1) for count in shape)
    return sample_field(nodes, rows, columns)
