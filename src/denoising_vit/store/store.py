"""The feature store: denoised features of a whole data set, at a local path or fsspec URL."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from denoising_vit.errors import StoreError
from denoising_vit.store import layout
from denoising_vit.store.fields import FieldArray
from denoising_vit.store.leases import Lease, Leases
from denoising_vit.store.manifest import EMPTY_MANIFEST, Manifest, reaching, read_manifest
from denoising_vit.store.objects import Objects, open_objects
from denoising_vit.store.passes import ExportKind, Problem, export_images, find_problems
from denoising_vit.store.reading import StoreReader
from denoising_vit.store.writing import ShardWriter


class FeatureStore(StoreReader):
    """Semantic fields of many images: written shard by shard, read by id or index.

    Its state is read from its objects on every call, so that progress of other processes is visible. A store can be
    pickled; other processes reopen it by its URL.

    Attributes:
        manifest: settings of the store.
        writable: True if it was opened for writing.
        objects: its objects.
        array: the sealed images.
        leases: the leases on its shards.
    """

    def __init__(self, objects: Objects, manifest: Manifest, *, writable: bool) -> None:
        """Use :meth:`create`, :meth:`open` or :meth:`create_or_open`."""
        super().__init__(objects, manifest)
        self.writable = writable
        self.leases = Leases(objects)

    @classmethod
    def create(cls, url: str | Path, manifest: Manifest, ids: Sequence[str]) -> FeatureStore:
        """Create a store for these images and open it for writing.

        Args:
            url: a folder, created if it does not exist, or an fsspec URL.
            manifest: settings; ``count`` and ``ids_digest`` are set from the ids.
            ids: unique ids of all images; their order determines indices and shards.

        Raises:
            StoreError: if the location is not empty or not writable, or if the ids are invalid.
        """
        objects = open_objects(url)
        manifest = manifest.with_ids(ids)
        _create(objects, manifest, list(ids))
        return cls(objects, manifest, writable=True)

    @classmethod
    def open(cls, url: str | Path, expected: Manifest | None = None, writable: bool = False) -> FeatureStore:
        """Open an existing store.

        Args:
            url: a folder or an fsspec URL.
            expected: settings that the store must have.
            writable: open it for writing.

        Raises:
            StoreError: if there is no store that this release can read, if it differs from ``expected`` (the message
                has both values of each difference), or if it is not writable.
        """
        objects = open_objects(url)
        manifest = read_manifest(objects)
        if expected is not None and (differences := manifest.mismatch(expected)):
            raise StoreError(
                f"{objects.url}: the store has other settings: {'; '.join(differences)}. Use the store's settings, or "
                "write to a new location"
            )
        if writable:
            objects.probe()
        return cls(objects, manifest, writable=writable)

    @classmethod
    def exists(cls, url: str | Path) -> bool:
        """True if there is a store.

        Raises:
            StoreError: if the location cannot be reached.
        """
        objects = open_objects(url)
        with reaching(objects):
            return layout.MANIFEST in objects.names() and bool(objects.read(layout.MANIFEST))

    @classmethod
    def create_or_open(cls, url: str | Path, manifest: Manifest, ids: Sequence[str]) -> FeatureStore:
        """Open a store for writing, or create it.

        Raises:
            StoreError: see :meth:`create` and :meth:`open`.
        """
        if not cls.exists(url):
            return cls.create(url, manifest, ids)
        return cls.open(url, manifest.with_ids(ids), writable=True)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the URL instead of open handles."""
        return _reopen, (self.url, self.writable)

    def lease(self, name: str) -> Lease:
        """A lease on something other than a shard, such as a whole run, as a context manager.

        Raises:
            StoreError: naming the holder's host and process, if another process holds it.
        """
        return self.leases.acquire(name)

    def writer(self, shard: int) -> ShardWriter:
        """The writer of a shard, as a context manager that holds the shard's lease.

        Raises:
            StoreError: if there is no such shard, or the store is read-only; on entering the block, if another process
                writes this shard.
        """
        if not self.writable:
            raise StoreError(f"{self.url}: the store is read-only; open it with FeatureStore.open(url, writable=True)")
        if not 0 <= shard < self.manifest.shards:
            raise StoreError(f"{self.url}: unknown shard {shard}; expected 0 to {self.manifest.shards - 1}")
        return ShardWriter(self, self.leases, shard)

    def retry_failed(self) -> list[int]:
        """Mark all failed images as missing again, and return their indices.

        Raises:
            StoreError: if another process writes one of their shards.
        """
        retried = []
        for shard in sorted({self.manifest.shard_of(index) for index in self.failed()}):
            with self.writer(shard) as writer:
                retried += writer.retry_failed()
        return retried

    def info(self) -> dict[str, Any]:
        """Counts, bytes and the manifest, as JSON values."""
        return {
            "url": self.url,
            "images": len(self),
            "done": len(self.done()),
            "failed": len(self.failed()),
            "staged": len(self.staged()),
            "shards": self.manifest.shards,
            "sealed": len(self.sealed()),
            "bytes": self.objects.used(),
            "manifest": json.loads(self.manifest.to_json()),
        }

    def verify(self) -> Iterator[Problem]:
        """Read everything with its checksums and yield any damage."""
        return find_problems(self)

    def export(
        self, folder: str | Path, kind: ExportKind = "npy", progress: Callable[[int, int], None] | None = None
    ) -> list[Path]:
        """Write each finished image to its own file in a local folder, named after its id.

        Raises:
            StoreError: if the kind is unknown, or an image is damaged.
            OutputError: naming an existing file with other content; then nothing is written.
            OSError: if the folder cannot be written to.
        """
        return export_images(self, Path(folder), kind, progress)


def _reopen(url: str, writable: bool) -> FeatureStore:
    objects = open_objects(url)
    return FeatureStore(objects, read_manifest(objects), writable=writable)


def _create(objects: Objects, manifest: Manifest, ids: list[str]) -> None:
    """Write ids, array and manifest of an empty store; the manifest is last, and may be empty after a power failure."""
    _require_usable(ids)
    with reaching(objects):
        found = set(objects.names())
    if layout.MANIFEST in found and objects.read(layout.MANIFEST):
        raise StoreError(f"{objects.url}: a feature store already exists here; open it, or choose another location")
    if not found <= {layout.IDS, layout.FIELD, layout.MANIFEST}:
        if layout.MANIFEST in found:
            raise StoreError(EMPTY_MANIFEST.format(objects.url))
        raise StoreError(
            f"{objects.url}: expected an empty or new folder for a feature store, found {', '.join(sorted(found)[:3])}"
        )
    _require_leftovers(objects, found, ids)
    objects.probe()
    objects.write(layout.IDS, json.dumps(ids).encode())
    FieldArray.create(objects, manifest)
    if layout.MANIFEST in found:
        objects.delete(layout.MANIFEST)
    if not objects.create(layout.MANIFEST, manifest.to_json().encode()):
        raise StoreError(f"{objects.url}: another process has just created a feature store here; open it")


def _require_leftovers(objects: Objects, found: set[str], ids: list[str]) -> None:
    """Check that existing files were left by an interrupted creation of the same store."""
    foreign = sorted(set(objects.names(layout.FIELD)) - {"zarr.json"}) if layout.FIELD in found else []
    if foreign:
        raise StoreError(
            f"{objects.url}: expected an empty or new folder for a feature store, but its folder {layout.FIELD} has "
            f"{', '.join(foreign[:3])}. Choose another location"
        )
    if layout.IDS in found and objects.read(layout.IDS) not in (json.dumps(ids).encode(), b""):
        raise StoreError(
            f"{objects.url}: {layout.IDS} lists other images than this run; choose another location, or delete the "
            "file if it is left over from an interrupted run"
        )


def _require_usable(ids: list[str]) -> None:
    if not ids:
        raise StoreError("a feature store needs at least one image, got no ids")
    if invalid := [name for name in ids if not isinstance(name, str) or not name]:
        raise StoreError(f"ids must be non-empty strings, got {invalid[0]!r}")
    name, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise StoreError(f"ids must be unique, but {name!r} occurs {count} times")
