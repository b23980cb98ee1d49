"""The zarr array of a store: one chunk with a checksum an image, several images a shard object."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from denoising_vit.store import layout
from denoising_vit.store.manifest import Manifest
from denoising_vit.store.objects import Objects


class FieldArray:
    """(N, Ry, Rx, C), NaN where nothing was stored."""

    def __init__(self, objects: Objects, manifest: Manifest, *, writable: bool) -> None:
        self._objects, self._manifest, self._writable = objects, manifest, writable
        self._opened: Any = None  # zarr's types allow for results that are not arrays
        self._pid = os.getpid()

    @property
    def _array(self) -> Any:
        """The zarr array, opened when it is first needed; its connections do not survive a fork."""
        import zarr

        if self._opened is None or self._pid != os.getpid():
            store = self._objects.zarr(layout.FIELD, read_only=not self._writable)
            mode = "r+" if self._writable else "r"
            self._opened = zarr.open_array(store, mode=mode, config={"write_empty_chunks": False})
            self._pid = os.getpid()
        return self._opened

    @staticmethod
    def create(objects: Objects, manifest: Manifest) -> None:
        """Writes the array's description; no data."""
        import zarr
        from zarr.codecs import Crc32cCodec

        chunk = (*manifest.field, manifest.channels)
        zarr.create_array(
            objects.zarr(layout.FIELD, read_only=False),
            shape=(manifest.count, *chunk),
            chunks=(1, *chunk),
            shards=(manifest.images_per_shard, *chunk),
            dtype=manifest.dtype,
            fill_value=float("nan"),
            compressors=(Crc32cCodec(),),  # features are noise to a compressor: it would gain 10 % and cost the time
            dimension_names=("image", "y", "x", "channel"),
            overwrite=True,
        )
        objects.settle(f"{layout.FIELD}/zarr.json")

    def read(self, index: int) -> np.ndarray:
        """One image, (Ry, Rx, C): two ranged reads, its place in the shard and its chunk.

        Raises:
            Exception: zarr's, where the shard is damaged or the checksum does not match.
        """
        return np.asarray(self._array[index])

    def blank(self, shard: int) -> np.ndarray:
        """A block (n, Ry, Rx, C) for the images of a shard, NaN throughout."""
        shape = (len(self._manifest.images_of(shard)), *self._manifest.field, self._manifest.channels)
        return np.full(shape, np.nan, dtype=self._manifest.dtype)

    def write_shard(self, shard: int, block: np.ndarray | None) -> None:
        """Replaces a shard by a block (n, Ry, Rx, C) in one put; images of NaN get no chunk, and None no shard.

        Raises:
            OSError: if it cannot be written.
        """
        # A shard object without marker may be damaged, and a shard that is not full would be read before it is written.
        self._objects.delete_below(layout.shard_folder(shard))
        if block is None:
            return
        images = self._manifest.images_of(shard)
        self._array[images.start : images.stop] = block
        self._objects.settle(layout.shard_key(shard))
