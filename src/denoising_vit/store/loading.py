"""Stores as training data: a PyTorch dataset, and a sampler that shuffles while reading only a few shards at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from denoising_vit.errors import StoreError
from denoising_vit.store.reading import StoreReader


class StoreDataset(Dataset[tuple[int, Tensor]]):
    """The finished images of a store: item ``k`` is (index in the store, field (Ry, Rx, C) float32).

    Finished images are listed once, so that an epoch does not change while the store grows.

    Args:
        store: the store.

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
    """Sample a store shard by shard, so that only a few objects are read at a time.

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
