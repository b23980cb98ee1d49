"""Writing a shard: images are staged one by one, or kept in memory, and sealed together once the shard is complete."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from torch import Tensor

from denoising_vit.errors import StoreError
from denoising_vit.store import layout
from denoising_vit.store.fields import StoredField, decode, encode, encode_scale, stored_field
from denoising_vit.store.layout import checked, packed
from denoising_vit.store.leases import Lease, Leases
from denoising_vit.store.reading import StoreReader

#: Images by index: the field as stored, and the record.
_Images = dict[int, tuple[StoredField, dict[str, Any]]]


class ShardWriter:
    """The only writer of a shard, as a context manager; created by :meth:`FeatureStore.writer`.

    Entering the context cleans up after a killed writer. Sealing has three steps, and the process may crash after each:
    write the shard, write its marker, delete the staged images. Without a marker, the shard is written again; with a
    marker, images that are still staged are deleted.
    """

    def __init__(self, store: StoreReader, leases: Leases, shard: int) -> None:
        self._store, self._leases, self.shard = store, leases, shard
        self._lease: Lease | None = None
        self._held: _Images = {}
        self._sealed = False

    @property
    def images(self) -> range:
        """Indices of the shard's images."""
        return self._store.manifest.images_of(self.shard)

    def missing(self) -> list[int]:
        """Images that are neither finished, in memory, nor failed."""
        if self._sealed:
            return []
        known = self._held.keys() | self._staged() | self._failed()
        return [index for index in self.images if index not in known]

    def put(self, index: int, field: Tensor, record: dict[str, Any] | None = None) -> None:
        """Stage an image, so that it survives a crash.

        Args:
            index: one of :attr:`images`.
            field: (Ry, Rx, C), of any float type.
            record: JSON values to store with it; its id is added.

        Raises:
            FieldError: naming the image, if the field does not fit the store; then call :meth:`fail`.
            StoreError: if the record does not consist of JSON values, or the lease was lost.
            OSError: if it cannot be written; then no part of it remains.
        """
        self._stage({index: self._checked(index, field, record)})

    def hold(self, index: int, field: Tensor, record: dict[str, Any] | None = None) -> None:
        """Keep an image in memory, to write it only once if the whole shard is sealed soon.

        It survives a crash only after :meth:`flush` or :meth:`finish`. Arguments and errors are those of :meth:`put`.
        """
        self._held[index] = self._checked(index, field, record)

    def flush(self) -> None:
        """Stage the images in memory.

        Raises:
            StoreError: if the lease was lost.
            OSError: if they cannot be written.
        """
        self._stage(self._held)
        self._held = {}

    def fail(self, index: int, reason: str) -> None:
        """Record that an image cannot be fitted, so that the shard can be sealed without it.

        Raises:
            StoreError: if the lease was lost.
            OSError: if it cannot be written.
        """
        name = self._require(index)
        content = packed({"id": name, "reason": reason})
        self._store.objects.write(layout.failed_key(index), json.dumps(content).encode())

    def finish(self) -> bool:
        """Seal the shard if no image is missing, else flush; True if the shard is now sealed.

        Damaged staged images are deleted; then they are :meth:`missing`, and the shard is not sealed.

        Raises:
            StoreError: if the lease was lost.
            OSError: if it cannot be written; staged images are kept.
        """
        if self._sealed:
            return True
        lease = self._require_lease()
        lease.check()
        images = self._load_staged() if not self.missing() else {}
        if self.missing():
            self.flush()
            return False
        images |= self._held
        failed = self._failed()
        reasons = self._store.reasons(failed - images.keys())
        for index in failed & images.keys():  # a second attempt succeeded
            self._store.objects.delete(layout.failed_key(index))
        lease.check()  # loading and writing a large shard takes a while
        self._store.array.write_shard(self.shard, {index: stored.values for index, (stored, _) in images.items()})
        lease.check()
        self._write_marker(images, reasons)
        self._sealed, self._held = True, {}
        self._discard_staged()
        return True

    def retry_failed(self) -> list[int]:
        """Mark failed images as missing again, and return their indices. The images of a sealed shard are staged first.

        Raises:
            StoreError: if the lease was lost, or a finished image is damaged.
            OSError: if it cannot be written; then the shard is still sealed.
        """
        self._require_lease().check()
        failed = sorted(self._failed() - self._staged())
        if failed and self._sealed:
            marker = self._store.marker(self.shard)
            for index in marker.records if marker is not None else ():
                self._stage({index: self._store.read_stored(index)})
            # Until here, a crash changes nothing: while the marker exists, staged images are deleted.
            self._store.objects.delete(layout.sealed_key(self.shard))
            self._store.forget(self.shard)
            self._sealed = False
        for index in failed:
            self._store.objects.delete(layout.failed_key(index))
        return failed

    def __enter__(self) -> ShardWriter:
        self._lease = self._leases.acquire(layout.shard_lease(self.shard))
        try:
            keys = [key for index in self.images for key in (layout.staged_key(index), layout.failed_key(index))]
            self._store.objects.sweep([*keys, layout.sealed_key(self.shard), layout.shard_key(self.shard)])
            self._sealed = self._store.marker(self.shard) is not None
            if self._sealed:
                self._discard_staged()
        except BaseException:
            self._lease.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exception: object) -> None:
        lease = self._require_lease()
        try:
            with contextlib.suppress(*([Exception] if kind is not None else [])):  # must not hide the first error
                self.flush()
        finally:
            self._lease = None
            lease.release(forget=self._sealed)  # a sealed shard is not written again

    def _checked(self, index: int, field: Tensor, record: dict[str, Any] | None) -> tuple[StoredField, dict[str, Any]]:
        name = self._require(index)
        record = {"id": name, **(record or {})}
        if record["id"] != name:
            raise StoreError(f"image {index} is {name!r}, but its record has the id {record['id']!r}")
        try:
            record = checked(packed(record))
        except (TypeError, ValueError) as error:
            raise StoreError(f"{name}: the record must consist of JSON values ({error})") from error
        return stored_field(field, self._store.manifest, name), record

    def _stage(self, images: _Images) -> None:
        for index, (stored, record) in images.items():  # a staged image takes precedence over an earlier failure
            self._require_lease().require()
            self._store.objects.write(layout.staged_key(index), encode(stored, index, record))

    def _load_staged(self) -> _Images:
        """The staged images; damaged ones are deleted."""
        images: _Images = {}
        for index in sorted(self._staged() - self._held.keys()):
            key = layout.staged_key(index)
            try:
                images[index] = decode(self._store.objects.read(key), self._store.manifest, key)
            except StoreError:
                self._store.objects.delete(key)
        return images

    def _write_marker(self, images: _Images, failed: dict[int, str]) -> None:
        records = {index: record for index, (_, record) in images.items()}
        scales = {
            index: encode_scale(stored.scale) for index, (stored, _) in images.items() if stored.scale is not None
        }
        marker = {"shard": self.shard, "images": records, "failed": failed} | ({"scales": scales} if scales else {})
        text = json.dumps(packed(marker), sort_keys=True)
        self._store.objects.write(layout.sealed_key(self.shard), text.encode())

    def _discard_staged(self) -> None:
        for index in self._staged():
            self._store.objects.delete(layout.staged_key(index))

    def _staged(self) -> set[int]:
        return self._store.staged() & set(self.images)

    def _failed(self) -> set[int]:
        return self._store.numbers(layout.FAILED) & set(self.images)

    def _require_lease(self) -> Lease:
        if self._lease is None:
            raise StoreError("expected a writer within `with store.writer(shard) as writer:`; this writer has no lease")
        return self._lease

    def _require(self, index: int) -> str:
        """The image's id, if this writer may write it now."""
        self._require_lease().require()
        if index not in self.images:
            raise StoreError(
                f"image {index} is not in shard {self.shard}, which has images {self.images.start} to "
                f"{self.images.stop - 1}"
            )
        name = self._store.ids[index]
        if self._sealed:
            raise StoreError(f"{name}: its shard {self.shard} is already sealed and cannot be written to")
        return name
