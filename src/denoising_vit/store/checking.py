"""Re-reading a whole store: every checksum, every marker, every staged image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from denoising_vit.errors import StoreError
from denoising_vit.store import layout
from denoising_vit.store.images import decode

if TYPE_CHECKING:
    from denoising_vit.store.store import FeatureStore


@dataclass(frozen=True)
class Problem:
    """Something in a store that is not as it was written.

    Attributes:
        where: the object, or the image by id.
        what: what is wrong with it.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def find_problems(store: FeatureStore) -> Iterator[Problem]:
    """Yields problems as they are found; none for a sound store, however unfinished."""
    try:
        ids = store.ids
    except StoreError as error:
        yield Problem(layout.IDS, str(error))
        return
    yield from _numbers_beyond(store)
    for shard in sorted(store.contents.sealed()):
        yield from _sealed(store, ids, shard)
    for index in sorted(store.contents.staged()):
        yield from _staged(store, ids, index)
    for index in sorted(layout.numbers(store.objects.names(layout.FAILED))):
        try:
            store.contents.reason(index)
        except StoreError as error:
            yield Problem(layout.failed_key(index), str(error))


def _numbers_beyond(store: FeatureStore) -> Iterator[Problem]:
    """Objects for images or shards that the store does not have."""
    for folder, end in (
        (layout.SEALED, store.manifest.shards),
        (layout.STAGED, len(store)),
        (layout.FAILED, len(store)),
    ):
        for number in sorted(layout.numbers(store.objects.names(folder))):
            if number >= end:
                yield Problem(f"{folder}/{number}", f"the store has only {end} of these")


def _sealed(store: FeatureStore, ids: list[str], shard: int) -> Iterator[Problem]:
    key = layout.sealed_key(shard)
    try:
        marker = store.contents.marker(shard)
    except StoreError as error:
        yield Problem(key, str(error))
        return
    if marker is None:  # it was there when it was listed
        yield Problem(key, "the marker is gone")
        return
    for index in store.manifest.images_of(shard):
        record = marker.records.get(index)
        if (record is None) == (index not in marker.failed):
            kind = "neither finished nor failed" if record is None else "both finished and failed"
            yield Problem(key, f"{ids[index]} is {kind}")
            continue
        if record is not None and record.get("id") != ids[index]:
            yield Problem(key, f"the record of {ids[index]} is of {record.get('id')}")
        try:
            field = store.array.read(index)
        except Exception as error:  # zarr meets damaged shards with ValueError, struct.error, RuntimeError, ...
            yield Problem(ids[index], f"its chunk in shard {shard} is damaged ({error})")
            continue
        if record is not None and not np.isfinite(field).all():
            yield Problem(ids[index], f"its marker says finished, its chunk in shard {shard} is not there")
        if record is None and not np.isnan(field).all():
            yield Problem(ids[index], f"its marker says failed, but there is a chunk in shard {shard}")


def _staged(store: FeatureStore, ids: list[str], index: int) -> Iterator[Problem]:
    key = layout.staged_key(index)
    if index >= len(ids):
        yield Problem(key, f"there are {len(ids)} images only")
        return
    try:
        _, record = decode(store.objects.read(key), store.manifest, key)
    except FileNotFoundError:  # sealed in the meantime
        return
    except StoreError as error:
        yield Problem(key, str(error))
        return
    if record.get("id") != ids[index]:
        yield Problem(key, f"the record of {ids[index]} is of {record.get('id')}")
