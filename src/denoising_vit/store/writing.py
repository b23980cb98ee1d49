"""Writing a shard: images are staged one by one, and sealed together when none is missing."""

from __future__ import annotations

import json
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from denoising_vit.errors import StoreError
from denoising_vit.store import layout
from denoising_vit.store.images import compact, decode, encode
from denoising_vit.store.leases import Lease
from denoising_vit.store.packing import packed

if TYPE_CHECKING:
    from denoising_vit.store.store import FeatureStore


class ShardWriter:
    """The one writer of a shard, for the length of a ``with`` block; from :meth:`FeatureStore.writer`.

    What a killed writer left is put right on entry. Sealing takes three steps, each of which may be the last one before
    a crash: write the shard, write its marker, delete the staged images. Without a marker the shard is written again;
    with one, what is still staged is deleted.
    """

    def __init__(self, store: FeatureStore, shard: int) -> None:
        self._store, self.shard = store, shard
        self._lease: Lease | None = None
        self._sealed = False

    @property
    def images(self) -> range:
        """Indices of the shard's images."""
        return self._store.manifest.images_of(self.shard)

    def missing(self) -> list[int]:
        """Images that are neither finished nor failed."""
        if self._sealed:
            return []
        staged, failed = self._staged(), self._failed()
        return [index for index in self.images if index not in staged and index not in failed]

    def put(self, index: int, field: Tensor, record: dict[str, Any] | None = None) -> None:
        """Finishes an image: from here on it survives a crash.

        Args:
            index: the image, one of :attr:`images`.
            field: (Ry, Rx, C), of any float type.
            record: what to keep with it, as JSON values; its id is added.

        Raises:
            FieldError: naming the image, if the field does not fit the store; :meth:`fail` is for these.
            StoreError: if the record is not JSON values, or if the lease was lost.
            OSError: if it cannot be written; no part of it is left.
        """
        name = self._require(index)
        record = {"id": name, **(record or {})}
        if record["id"] != name:
            raise StoreError(f"image {index} is {name!r}, its record says {record['id']!r}")
        data = encode(compact(field, self._store.manifest, name), index, record)
        self._store.objects.write(layout.staged_key(index), data)  # counts more than an earlier failure

    def fail(self, index: int, reason: str) -> None:
        """Records that an image cannot be done, so that the shard can be sealed without it.

        Raises:
            StoreError: if the lease was lost.
            OSError: if it cannot be written.
        """
        name = self._require(index)
        content = packed({"id": name, "reason": reason})
        self._store.objects.write(layout.failed_key(index), json.dumps(content).encode())

    def finish(self) -> bool:
        """Seals the shard if every image of it is finished or failed; whether it is sealed now.

        A staged image that turns out to be damaged is discarded: it is among :meth:`missing` then, and the shard is not
        sealed.

        Raises:
            StoreError: if the lease was lost.
            OSError: if it cannot be written; the staged images are still there.
        """
        if self._sealed:
            return True
        self._held().check()
        if self.missing():
            return False
        block, records = self._load_staged()
        if self.missing():
            return False
        failed = self._store.contents.reasons(index for index in self._failed() if index not in records)
        for index in self._failed() & set(records):  # finished in a second attempt, whose writer was then killed
            self._store.objects.delete(layout.failed_key(index))
        self._held().check()  # loading a large shard takes a while, and so does writing it
        self._store.array.write_shard(self.shard, block if records else None)
        self._held().check()
        marker = packed({"shard": self.shard, "images": records, "failed": failed})
        text = json.dumps(marker, sort_keys=True)
        self._store.objects.write(layout.sealed_key(self.shard), text.encode())
        self._sealed = True
        self._discard_staged()
        return True

    def retry_failed(self) -> list[int]:
        """Makes the failed images missing again; those indices. The images of a sealed shard are staged for that.

        Raises:
            StoreError: if the lease was lost, or a finished image is damaged.
            OSError: if it cannot be written; the shard is still sealed then.
        """
        self._held().check()
        failed = sorted(self._failed() - self._staged())
        if failed and self._sealed:
            marker = self._store.contents.marker(self.shard)
            for index in marker.records if marker is not None else ():
                field, record = self._store.read(index)
                self._store.objects.write(layout.staged_key(index), encode(torch.from_numpy(field), index, record))
            # Until here a crash changes nothing: beside a marker, what is staged is discarded.
            self._store.objects.delete(layout.sealed_key(self.shard))
            self._store.contents.forget(self.shard)
            self._sealed = False
        for index in failed:
            self._store.objects.delete(layout.failed_key(index))
        return failed

    def __enter__(self) -> ShardWriter:
        self._lease = self._store.leases.acquire(layout.shard_lease(self.shard))
        try:
            keys = [key for index in self.images for key in (layout.staged_key(index), layout.failed_key(index))]
            self._store.objects.sweep([*keys, layout.sealed_key(self.shard)])
            self._sealed = self._store.contents.marker(self.shard) is not None
            if self._sealed:
                self._discard_staged()
        except BaseException:
            self._lease.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lease, self._lease = self._held(), None
        lease.release(forget=self._sealed)  # nobody writes a sealed shard again

    def _load_staged(self) -> tuple[np.ndarray, dict[int, dict[str, Any]]]:
        """The shard's block, and the records of the staged images that are sound; the others are deleted."""
        block, records = self._store.array.blank(self.shard), {}
        for index in sorted(self._staged()):
            key = layout.staged_key(index)
            try:
                field, record = decode(self._store.objects.read(key), self._store.manifest, key)
                block[index - self.images.start] = field.numpy()
                records[index] = record
            except StoreError:
                self._store.objects.delete(key)
        return block, records

    def _discard_staged(self) -> None:
        for index in self._staged():
            self._store.objects.delete(layout.staged_key(index))

    def _staged(self) -> set[int]:
        return layout.numbers(self._store.objects.names(layout.STAGED)) & set(self.images)

    def _failed(self) -> set[int]:
        return layout.numbers(self._store.objects.names(layout.FAILED)) & set(self.images)

    def _held(self) -> Lease:
        if self._lease is None:
            raise StoreError(
                "a shard is written within `with store.writer(shard) as writer:`; this writer has no lease"
            )
        return self._lease

    def _require(self, index: int) -> str:
        """The image's id, if this writer may write it now."""
        self._held().require()
        if index not in self.images:
            raise StoreError(
                f"image {index} is not in shard {self.shard}, which has images {self.images.start} to "
                f"{self.images.stop - 1}"
            )
        name = self._store.ids[index]
        if self._sealed:
            raise StoreError(f"{name}: its shard {self.shard} is sealed already, nothing more can be written to it")
        return name
