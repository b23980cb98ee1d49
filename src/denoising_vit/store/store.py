"""The feature store: the denoised features of a whole dataset, at a local path or any URL that fsspec knows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from denoising_vit.errors import StoreError
from denoising_vit.store import layout
from denoising_vit.store.checking import Problem, find_problems
from denoising_vit.store.contents import Contents, Marker
from denoising_vit.store.exporting import ExportKind, export_images
from denoising_vit.store.fields import FieldArray
from denoising_vit.store.images import decode
from denoising_vit.store.leases import Lease, Leases
from denoising_vit.store.manifest import Manifest
from denoising_vit.store.objects import Objects
from denoising_vit.store.opening import create_objects, is_store, read_ids, read_manifest
from denoising_vit.store.remote import open_objects
from denoising_vit.store.stored import MissingImageError, StoredFeatures
from denoising_vit.store.writing import ShardWriter


class FeatureStore:
    """Semantic fields of many images: written shard by shard, read by id or index.

    It can be sent to other processes: they open it again by its URL. What is done is always read from what exists, so
    a store that another process writes shows its progress.

    Attributes:
        manifest: what the store was made with.
        writable: whether it was opened for writing.
        objects: the objects that it consists of.
        contents: what is done, in detail.
        array: the sealed images.
        leases: who writes which shard.
    """

    def __init__(self, objects: Objects, manifest: Manifest, *, writable: bool) -> None:
        """Use :meth:`create`, :meth:`open` or :meth:`create_or_open`."""
        self.objects, self.manifest, self.writable = objects, manifest, writable
        self.contents = Contents(objects, manifest)
        self.array = FieldArray(objects, manifest, writable=writable)
        self.leases = Leases(objects)

    @classmethod
    def create(cls, url: str | Path, manifest: Manifest, ids: Sequence[str]) -> FeatureStore:
        """Makes a new store for these images and opens it for writing.

        Args:
            url: a folder, made if it is not there, or an fsspec URL.
            manifest: its ``count`` and ``ids_digest`` are filled in from the ids.
            ids: of all images, each once; their order decides indices and shards.

        Raises:
            StoreError: if there is something already, if it cannot be written to, or if an id comes twice.
        """
        objects = open_objects(url)
        manifest = manifest.with_ids(ids)
        create_objects(objects, manifest, list(ids))
        return cls(objects, manifest, writable=True)

    @classmethod
    def open(cls, url: str | Path, expected: Manifest | None = None, writable: bool = False) -> FeatureStore:
        """Opens a store that is there.

        Args:
            url: a folder or an fsspec URL.
            expected: what the store must have been made with.
            writable: whether it is going to be written to; reading needs no permission to write.

        Raises:
            StoreError: if there is none, if it is something else or of a newer version, if it is not the expected one,
                naming each difference with both sides, or if it must be writable and is not.
        """
        objects = open_objects(url)
        manifest = read_manifest(objects)
        differences = manifest.mismatch(expected) if expected is not None else []
        if differences:
            raise StoreError(
                f"{objects.url}: the store was made for something else: {'; '.join(differences)}. Run with the store's "
                "settings, or write to a new place"
            )
        if writable:
            objects.probe()
        return cls(objects, manifest, writable=writable)

    @classmethod
    def exists(cls, url: str | Path) -> bool:
        """Whether there is a store.

        Raises:
            StoreError: if the place cannot be reached.
        """
        return is_store(open_objects(url))

    @classmethod
    def create_or_open(cls, url: str | Path, manifest: Manifest, ids: Sequence[str]) -> FeatureStore:
        """Goes on with the store that is there, or makes it; in both cases for writing.

        Raises:
            StoreError: as :meth:`create` and :meth:`open` do.
        """
        if not cls.exists(url):
            return cls.create(url, manifest, ids)
        return cls.open(url, manifest.with_ids(ids), writable=True)

    @property
    def url(self) -> str:
        """Where it is."""
        return self.objects.url

    @cached_property
    def ids(self) -> list[str]:
        """Ids of all images in order, finished or not.

        Raises:
            StoreError: if they are not those that the store was made with.
        """
        return read_ids(self.objects, self.manifest)

    def __len__(self) -> int:
        """All images, finished or not."""
        return self.manifest.count

    def __reduce__(self) -> tuple[Any, ...]:
        """Other processes get the URL, never open handles."""
        return _reopen, (self.url, self.writable)

    def done(self) -> set[int]:
        """Indices of the images that are finished, whether their shard is sealed or not."""
        return self.contents.done()

    def failed(self) -> dict[int, str]:
        """Why images could not be done, by index."""
        return self.contents.failed()

    def unfinished(self) -> list[int]:
        """The shards that still need a writer: to do images, to seal, or to tidy up after a crash."""
        return self.contents.unfinished()

    def lease(self, name: str) -> Lease:
        """A lease on something else than a shard, such as a whole run, for a ``with`` block.

        Raises:
            StoreError: naming the holder's host and process, if another has it.
        """
        return self.leases.acquire(name)

    def writer(self, shard: int) -> ShardWriter:
        """The writer of a shard, for a ``with`` block, which holds its lease.

        Raises:
            StoreError: if there is no such shard, or the store is open for reading only; on entering the block, if
                another process writes this shard.
        """
        if not self.writable:
            raise StoreError(f"{self.url}: open for reading only; expected FeatureStore.open(url, writable=True)")
        if not 0 <= shard < self.manifest.shards:
            raise StoreError(f"{self.url}: no shard {shard}; expected 0 to {self.manifest.shards - 1}")
        return ShardWriter(self, shard)

    def retry_failed(self) -> list[int]:
        """Makes all failed images missing again, so that they are tried once more; their indices.

        Raises:
            StoreError: if another process writes one of their shards.
        """
        retried = []
        for shard in sorted({self.manifest.shard_of(index) for index in self.failed()}):
            with self.writer(shard) as writer:
                retried += writer.retry_failed()
        return retried

    def __getitem__(self, image: int | str) -> StoredFeatures:
        """The features of a finished image, by index or id.

        Raises:
            MissingImageError: if it is unknown, not finished yet, or failed, with the reason.
            StoreError: if it is damaged.
        """
        index = self.index(image)
        field, record = self.read(index)
        manifest = self.manifest
        return StoredFeatures(
            index=index,
            id=self.ids[index],
            field=torch.from_numpy(field).float(),
            record=record,
            size=manifest.size,
            patch_size=manifest.patch_size,
            stride=manifest.stride,
        )

    def index(self, image: int | str) -> int:
        """The place of an image given by id or by that place itself.

        Raises:
            MissingImageError: if there is no such image.
        """
        if isinstance(image, str):
            if image not in self._places:
                raise MissingImageError(f"{self.url}: no image {image!r} among the {len(self)} in this store")
            return self._places[image]
        if not 0 <= image < len(self):
            raise MissingImageError(
                f"{self.url}: no image {image}; expected an index of 0 to {len(self) - 1}, or an id"
            )
        return int(image)

    def read(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        """An image's field as stored, (Ry, Rx, C), and its record.

        Raises:
            MissingImageError: if it is not finished, or failed.
            StoreError: if it is damaged.
        """
        try:
            return self._read(index)
        except StoreError:
            # Another process may have opened the shard again, and sealed it with other images, since it was looked at.
            self.contents.forget(self.manifest.shard_of(index))
            return self._read(index)

    def _read(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        shard = self.manifest.shard_of(index)
        if self.contents.marker(shard) is None:
            try:
                key = layout.staged_key(index)
                field, record = decode(self.objects.read(key), self.manifest, f"{self.url}: {key}")
                return field.numpy(), record
            except FileNotFoundError:
                pass  # not done, or sealed since
        marker = self.contents.marker(shard)
        if marker is None or index not in marker.records:
            raise MissingImageError(f"{self.url}: {self._why_missing(index, marker)}")
        try:
            field = self.array.read(index)
        except Exception as error:  # zarr meets damaged shards with ValueError, struct.error, RuntimeError, ...
            raise StoreError(
                f"{self.url}: {self.ids[index]} in shard {shard} cannot be read ({error}); `dvit store verify` shows "
                "what is damaged"
            ) from error
        if not np.isfinite(field).all():
            raise StoreError(f"{self.url}: {self.ids[index]} is gone from shard {shard}; expected its chunk there")
        return field, marker.records[index]

    def info(self) -> dict[str, Any]:
        """Counts, bytes and the manifest, as JSON values."""
        done, failed = self.done(), self.failed()
        return {
            "url": self.url,
            "images": len(self),
            "done": len(done),
            "failed": len(failed),
            "staged": len(self.contents.staged()),
            "shards": self.manifest.shards,
            "sealed": len(self.contents.sealed()),
            "bytes": self.objects.used(),
            "manifest": json.loads(self.manifest.to_json()),
        }

    def verify(self) -> Iterator[Problem]:
        """Re-reads everything with its checksums and yields what is not as it was written."""
        return find_problems(self)

    def export(
        self, folder: str | Path, kind: ExportKind = "npy", progress: Callable[[int, int], None] | None = None
    ) -> list[Path]:
        """Writes each finished image to a file of its own in a local folder, named after its id.

        Raises:
            StoreError: if the kind is unknown, or an image is damaged.
            OutputError: if there is a file with other content, by name; nothing is written then.
            OSError: if the folder cannot be written to.
        """
        return export_images(self, Path(folder), kind, progress)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.ids)}

    def _why_missing(self, index: int, marker: Marker | None) -> str:
        name = self.ids[index]
        reason = marker.failed.get(index) if marker else self.contents.reasons([index]).get(index)
        return f"{name} failed: {reason}" if reason is not None else f"{name} is not finished yet"


def _reopen(url: str, writable: bool) -> FeatureStore:
    objects = open_objects(url)
    return FeatureStore(objects, read_manifest(objects), writable=writable)
