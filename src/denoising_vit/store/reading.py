"""Reading a store: the finished images, and their fields."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from denoising_vit.decomposition.result import Decomposition
from denoising_vit.errors import StoreError
from denoising_vit.store import layout
from denoising_vit.store.fields import FieldArray, StoredField, decode, decode_scale
from denoising_vit.store.layout import unpacked
from denoising_vit.store.manifest import Manifest, read_ids
from denoising_vit.store.objects import Objects

#: Number of markers in memory; each has the records of a shard's images.
_MARKERS_KEPT = 256


class MissingImageError(StoreError, KeyError):
    """A store does not have the image: it is unknown, not finished yet, or failed."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would add quotes


@dataclass(frozen=True, eq=False)
class StoredFeatures:
    """The semantic field of one image of a store.

    Attributes:
        index: index of the image in the store.
        id: id of the image in the data set.
        field: F on its own nodes, (Ry, Rx, C) float32; nodes are at cell centres of [0, 1]^2.
        record: JSON values recorded with it, such as ``heldout_r2``.
        size: (H, W) in pixels of the backbone's input.
        patch_size: side of a patch in pixels.
        stride: distance between patches in pixels.
    """

    index: int
    id: str
    field: Tensor = dataclasses.field(repr=False)
    record: dict[str, Any]
    size: tuple[int, int]
    patch_size: int
    stride: int

    @cached_property
    def semantic(self) -> Tensor:
        """F at the patch centres, (h, w, C)."""
        return self._decomposition.semantic

    def sample(self, coords: Tensor) -> Tensor:
        """F by bilinear interpolation at ``coords`` (..., 2), (x, y) in [0, 1] of the image -> (..., C)."""
        return self._decomposition.sample(coords)

    @cached_property
    def _decomposition(self) -> Decomposition:
        """A decomposition with the field only; a store keeps neither G nor the raw features."""
        nothing = torch.empty(0)
        return Decomposition(self.field, nothing, nothing, self.size, self.patch_size, self.stride, self.record)


@dataclass(frozen=True)
class Marker:
    """The marker of a sealed shard."""

    records: dict[int, dict[str, Any]]  #: record of each finished image, by index
    failed: dict[int, str]  #: reason of each failed image, by index
    scales: dict[int, np.ndarray]  #: scale (C,) of each finished image, by index; for int8 only


class StoreReader:
    """An open store: its settings, ids, state and fields.

    The state is read from the store's objects on every call, because other processes may be writing.

    Attributes:
        manifest: settings of the store.
        objects: its objects.
        array: the sealed images.
    """

    def __init__(self, objects: Objects, manifest: Manifest) -> None:
        self.objects, self.manifest = objects, manifest
        self.array = FieldArray(objects, manifest)
        self._markers: OrderedDict[int, tuple[object, Marker]] = OrderedDict()

    @property
    def url(self) -> str:
        """Path or URL of the store."""
        return self.objects.url

    @cached_property
    def ids(self) -> list[str]:
        """Ids of all images in order, finished or not.

        Raises:
            StoreError: if they were changed since the store was created.
        """
        return read_ids(self.objects, self.manifest)

    def __len__(self) -> int:
        """Number of images, finished or not."""
        return self.manifest.count

    def done(self) -> set[int]:
        """Indices of finished images, sealed or not."""
        # In this order: a shard that is sealed between both listings is in the second, even if not in the first.
        staged, failed = self.staged(), self.numbers(layout.FAILED)
        sealed = {index for shard in self.sealed() for index in self.manifest.images_of(shard)}
        return (sealed - failed) | staged

    def failed(self) -> dict[int, str]:
        """Reasons why images failed, by index."""
        return self.reasons(self.numbers(layout.FAILED) - self.staged())

    def staged(self) -> set[int]:
        """Indices of finished images whose shard is not sealed yet."""
        return self.numbers(layout.STAGED)

    def sealed(self) -> set[int]:
        """Numbers of the complete shards."""
        return self.numbers(layout.SEALED)

    def unfinished(self) -> list[int]:
        """Shards that need a writer: to fit images, to seal them, or to clean up after a crash."""
        untidy = {self.manifest.shard_of(index) for index in self.staged()}
        return sorted((set(range(self.manifest.shards)) - self.sealed()) | untidy)

    def reasons(self, indices: Iterable[int]) -> dict[int, str]:
        """Reasons why the given images failed, by index; images that did not fail are left out."""
        found = {}
        for index in sorted(indices):
            try:
                found[index] = self.reason(index)
            except FileNotFoundError:  # a second attempt has succeeded
                continue
            except StoreError as error:  # the image still failed; the next run retries it
                found[index] = str(error)
        return found

    def reason(self, index: int) -> str:
        """Reason why an image failed.

        Raises:
            FileNotFoundError: if it did not fail.
            StoreError: if the object with the reason is damaged.
        """
        key = layout.failed_key(index)
        try:
            return str(unpacked(self.objects.read(key))["reason"])
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self.objects.url}: {key} is damaged ({error})") from error

    def marker(self, shard: int) -> Marker | None:
        """The marker of a shard; None if it is not sealed.

        Raises:
            StoreError: if the marker is damaged.
        """
        key = layout.sealed_key(shard)
        stamp = self.objects.stamp(key)  # taken before reading, so that a marker rewritten meanwhile is read again
        kept_stamp, kept = self._markers.get(shard, (None, None))
        if kept is not None and kept_stamp == stamp:
            return kept
        self.forget(shard)
        try:
            content = unpacked(self.objects.read(key))
            records = {int(index): dict(record) for index, record in content["images"].items()}
            failed = {int(index): str(reason) for index, reason in content["failed"].items()}
            scales = {int(index): decode_scale(scale) for index, scale in content.get("scales", {}).items()}
            if self.manifest.dtype == "int8" and scales.keys() != records.keys():
                raise ValueError("scales of images are missing")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{self.objects.url}: {key} is damaged ({error})") from error
        marker = Marker(records, failed, scales)
        self._markers[shard] = stamp, marker
        while len(self._markers) > _MARKERS_KEPT:
            self._markers.popitem(last=False)
        return marker

    def forget(self, shard: int) -> None:
        """Read a shard's marker again on next use, because the shard may have been reopened."""
        self._markers.pop(shard, None)

    def numbers(self, folder: str) -> set[int]:
        """Image indices or shard numbers of the objects in a folder of the store."""
        return layout.numbers(self.objects.names(folder))

    def __getitem__(self, image: int | str) -> StoredFeatures:
        """The features of a finished image, by index or id.

        Raises:
            MissingImageError: if it is unknown, not finished yet, or failed, with the reason.
            StoreError: if it is damaged.
        """
        index, manifest = self.index(image), self.manifest
        field, record = self.read(index)
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
        """The index of an image given by index or id.

        Raises:
            MissingImageError: if there is no such image.
        """
        if isinstance(image, str):
            if image not in self._indices:
                raise MissingImageError(f"{self.url}: unknown image {image!r}; the store has {len(self)} images")
            return self._indices[image]
        if not 0 <= image < len(self):
            raise MissingImageError(
                f"{self.url}: no image {image}; expected an index from 0 to {len(self) - 1}, or an id"
            )
        return int(image)

    def read(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        """An image's field (Ry, Rx, C) as floats, and its record.

        Raises:
            MissingImageError: if it is not finished, or failed.
            StoreError: if it is damaged.
        """
        stored, record = self.read_stored(index)
        return stored.floats, record

    def read_stored(self, index: int) -> tuple[StoredField, dict[str, Any]]:
        """Like :meth:`read`, with the field in the store's precision."""
        try:
            return self._read(index)
        except StoreError:
            # Another process may have reopened the shard and sealed it with other images.
            self.forget(self.manifest.shard_of(index))
            return self._read(index)

    def _read(self, index: int) -> tuple[StoredField, dict[str, Any]]:
        shard = self.manifest.shard_of(index)
        if self.marker(shard) is None:
            key = layout.staged_key(index)
            with contextlib.suppress(FileNotFoundError):  # not done, or sealed since the check
                return decode(self.objects.read(key), self.manifest, f"{self.url}: {key}")
        marker = self.marker(shard)
        if marker is None or index not in marker.records:
            raise MissingImageError(f"{self.url}: {self._why_missing(index, marker)}")
        try:
            stored = StoredField(self.array.read(index), marker.scales.get(index))
        except Exception as error:  # zarr raises ValueError, struct.error, RuntimeError, ... for damaged shards
            raise StoreError(
                f"{self.url}: {self.ids[index]} in shard {shard} cannot be read ({error}); list the damage with "
                "`dvit store verify`"
            ) from error
        if not stored.exists:
            raise StoreError(f"{self.url}: the chunk of {self.ids[index]} is missing from shard {shard}")
        return stored, marker.records[index]

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.ids)}

    def _why_missing(self, index: int, marker: Marker | None) -> str:
        name = self.ids[index]
        reason = marker.failed.get(index) if marker else self.reasons([index]).get(index)
        return f"{name} failed: {reason}" if reason is not None else f"{name} is not finished yet"
