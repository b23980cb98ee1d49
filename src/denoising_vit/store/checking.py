"""Verification of a store: every checksum, marker and staged image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from denoising_vit.errors import StoreError
from denoising_vit.store import layout
from denoising_vit.store.fields import StoredField, decode
from denoising_vit.store.reading import StoreReader


@dataclass(frozen=True)
class Problem:
    """Damage found in a store.

    Attributes:
        where: the object, or the id of the image.
        what: description of the damage.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def find_problems(store: StoreReader) -> Iterator[Problem]:
    """Yield problems as they are found; none for an intact store, finished or not."""
    try:
        ids = store.ids
    except StoreError as error:
        yield Problem(layout.IDS, str(error))
        return
    ends = {layout.SEALED: store.manifest.shards, layout.STAGED: len(store), layout.FAILED: len(store)}
    for folder, end in ends.items():
        for number in sorted(layout.numbers(store.objects.names(folder))):
            if number >= end:
                yield Problem(f"{folder}/{number}", f"expected a number below {end}")
    for shard in sorted(store.sealed()):
        yield from _sealed(store, ids, shard)
    for index in sorted(store.staged()):
        if index < len(ids):  # the others are reported above
            yield from _staged(store, ids, index)
    for index in sorted(layout.numbers(store.objects.names(layout.FAILED))):
        try:
            store.reason(index)
        except StoreError as error:
            yield Problem(layout.failed_key(index), str(error))


def _sealed(store: StoreReader, ids: list[str], shard: int) -> Iterator[Problem]:
    key = layout.sealed_key(shard)
    try:
        marker = store.marker(shard)
    except StoreError as error:
        yield Problem(key, str(error))
        return
    if marker is None:  # deleted after the listing
        yield Problem(key, "the marker is missing")
        return
    for index in store.manifest.images_of(shard):
        record = marker.records.get(index)
        if (record is None) == (index not in marker.failed):
            kind = "neither finished nor failed" if record is None else "both finished and failed"
            yield Problem(key, f"{ids[index]} is {kind}")
            continue
        if record is not None and record.get("id") != ids[index]:
            yield Problem(key, f"the record of {ids[index]} belongs to {record.get('id')}")
        try:
            values = store.array.read(index)
        except Exception as error:  # zarr raises ValueError, struct.error, RuntimeError, ... for damaged shards
            yield Problem(ids[index], f"its chunk in shard {shard} is damaged ({error})")
            continue
        if record is not None and not StoredField(values, marker.scales.get(index)).exists:
            yield Problem(ids[index], f"marked as finished, but its chunk is missing from shard {shard}")
        if record is None and not np.array_equal(values, np.full_like(values, store.array.missing), equal_nan=True):
            yield Problem(ids[index], f"marked as failed, but shard {shard} has its chunk")


def _staged(store: StoreReader, ids: list[str], index: int) -> Iterator[Problem]:
    key = layout.staged_key(index)
    try:
        _, record = decode(store.objects.read(key), store.manifest, key)
    except FileNotFoundError:  # sealed since the listing
        return
    except StoreError as error:
        yield Problem(key, str(error))
        return
    if record.get("id") != ids[index]:
        yield Problem(key, f"the record of {ids[index]} belongs to {record.get('id')}")
