"""Passes over a whole store: verification of its objects, export of its images to single files, and training epochs."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from denoising_vit.errors import OutputError, StoreError
from denoising_vit.files import atomic_path, make_folder
from denoising_vit.store import layout
from denoising_vit.store.fields import StoredField, decode, encode
from denoising_vit.store.reading import StoreReader

#: Types of exported files.
ExportKind = Literal["npy", "safetensors"]

#: Maximum length of an exported file name without suffix.
_LONGEST = 150


@dataclass(frozen=True)
class Problem:
    """Damage found in a store."""

    where: str  #: the object, or the id of the image
    what: str  #: description of the damage

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
        too_large = sorted(number for number in store.numbers(folder) if number >= end)
        for number in too_large:
            yield Problem(f"{folder}/{number}", f"expected a number below {end}")
    for shard in sorted(store.sealed()):
        yield from _sealed(store, ids, shard)
    for index in sorted(store.staged()):
        if index < len(ids):  # the others are reported above
            yield from _staged(store, ids, index)
    for index in sorted(store.numbers(layout.FAILED)):
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


def export_images(
    store: StoreReader, folder: Path, kind: ExportKind, progress: Callable[[int, int], None] | None = None
) -> list[Path]:
    """Write each finished image to its own file, atomically; see :meth:`FeatureStore.export`."""
    if kind not in get_args(ExportKind):
        raise StoreError(f"the kind of export must be {' or '.join(get_args(ExportKind))}, got {kind!r}")
    make_folder(folder)
    names = file_names(store.ids)
    paths = {index: folder / f"{names[index]}.{kind}" for index in sorted(store.done())}
    existing = {index for index, path in paths.items() if os.path.lexists(path)}
    for index in sorted(existing):  # before anything is written
        # An .npy file has no room for a mark: only identical content shows that a file is from an earlier export.
        if not paths[index].is_file() or paths[index].read_bytes() != _content(store, index, kind):
            raise OutputError(
                f"{paths[index]} exists and has other content; export to another folder, or move the file away"
            )
    for count, (index, path) in enumerate(paths.items(), 1):
        if index not in existing:
            with atomic_path(path, new=True) as temporary:
                temporary.write_bytes(_content(store, index, kind))
        if progress is not None:
            progress(count, len(paths))
    return list(paths.values())


def _content(store: StoreReader, index: int, kind: ExportKind) -> bytes:
    """Content of an image's file, identical on every export."""
    field, record = store.read(index)
    if kind == "safetensors":
        return encode(StoredField(field), index, record)
    file = io.BytesIO()
    np.save(file, field, allow_pickle=False)
    return file.getvalue()


def file_names(ids: Sequence[str]) -> list[str]:
    """A file name for each id, in order: never a path, and unique even on case-insensitive file systems.

    An id that is a plain name is kept; any other is sanitized, and its index appended.
    """
    plain = [re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".")[:_LONGEST] or "image" for name in ids]
    taken = {name.casefold() for name, original in zip(plain, ids, strict=True) if name == original}
    used: set[str] = set()
    result = []
    for index, (original, name) in enumerate(zip(ids, plain, strict=True)):
        if name != original or name.casefold() in used:
            name = f"{name}-{index}"
            while name.casefold() in taken or name.casefold() in used:
                name += "_"
        used.add(name.casefold())
        result.append(name)
    return result


class StoreDataset(Dataset[tuple[int, Tensor]]):
    """The finished images of a store: item ``k`` is (index in the store, field (Ry, Rx, C) float32).

    Finished images are listed once, so that an epoch does not change while the store grows.

    Attributes:
        indices: store index of each item, ascending.
    """

    def __init__(self, store: StoreReader) -> None:
        self.store = store
        self.indices = sorted(store.done())
        if not self.indices:
            raise StoreError(f"{store.url}: no image is finished; run `dvit fit` first")

    def __len__(self) -> int:
        """Number of finished images."""
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[int, Tensor]:
        """An image's index in the store, and its field."""
        index = self.indices[item]
        field, _ = self.store.read(index)
        return index, torch.from_numpy(field).float()


class ShardSampler(Sampler[int]):
    """Shuffle a store while reading only a few shards at a time.

    Shards are shuffled, and the images of a window of consecutive shards are shuffled together. Each finished image
    occurs once per epoch. The order depends only on seed and epoch.

    Args:
        dataset: the dataset; the sampler yields its items, not store indices.
        seed: seed for the order.
        shuffle: shuffle the images; otherwise they come in the store's order.
        window: number of shards to mix.
    """

    def __init__(self, dataset: StoreDataset, seed: int = 0, shuffle: bool = True, window: int = 4) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1 shard, got {window}")
        self._seed, self._shuffle, self._window = seed, shuffle, window
        self._epoch = 0
        shards = np.array(dataset.indices) // dataset.store.manifest.images_per_shard
        self._shards = np.split(np.arange(len(shards)), np.flatnonzero(np.diff(shards)) + 1)  # items of each shard
        self._length = len(dataset)

    def set_epoch(self, epoch: int) -> None:
        """Select the order of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Number of finished images."""
        return self._length

    def __iter__(self) -> Iterator[int]:
        """Items of the dataset."""
        if not self._shuffle:
            yield from range(self._length)
            return
        random = np.random.default_rng([self._seed, self._epoch])
        order = random.permutation(len(self._shards))
        for start in range(0, len(order), self._window):
            items = np.concatenate([self._shards[shard] for shard in order[start : start + self._window]])
            yield from random.permutation(items).tolist()
