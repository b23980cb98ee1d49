"""What a store holds, read from which objects exist."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from denoising_vit.errors import StoreError
from denoising_vit.store import layout
from denoising_vit.store.manifest import Manifest
from denoising_vit.store.objects import Objects
from denoising_vit.store.packing import unpacked

#: Markers kept in memory; one holds the records of a shard's images.
_MARKERS_KEPT = 256


@dataclass(frozen=True)
class Marker:
    """What the marker of a sealed shard says.

    Attributes:
        records: of each finished image, by index.
        failed: why each other image failed, by index.
    """

    records: dict[int, dict[str, Any]]
    failed: dict[int, str]


class Contents:
    """The state of a store, asked for anew each time: other processes may be writing."""

    def __init__(self, objects: Objects, manifest: Manifest) -> None:
        self._objects, self._manifest = objects, manifest
        self._markers: OrderedDict[int, tuple[object, Marker]] = OrderedDict()

    def done(self) -> set[int]:
        """Indices of the images that are finished, whether their shard is sealed or not."""
        # In this order: what is sealed between the listings is in the last one, if not in the first.
        staged, failed = self.staged(), self._numbers(layout.FAILED)
        sealed = {index for shard in self.sealed() for index in self._manifest.images_of(shard)}
        return (sealed - failed) | staged

    def failed(self) -> dict[int, str]:
        """Why images could not be done, by index."""
        return self.reasons(self._numbers(layout.FAILED) - self.staged())

    def staged(self) -> set[int]:
        """Indices of the finished images whose shard is not sealed yet."""
        return self._numbers(layout.STAGED)

    def sealed(self) -> set[int]:
        """The shards that are whole."""
        return self._numbers(layout.SEALED)

    def unfinished(self) -> list[int]:
        """The shards that still need a writer: to do images, to seal, or to tidy up after a crash."""
        untidy = {self._manifest.shard_of(index) for index in self.staged()}
        return sorted((set(range(self._manifest.shards)) - self.sealed()) | untidy)

    def reasons(self, indices: Iterable[int]) -> dict[int, str]:
        """Why these images failed, by index; without those that have not."""
        found = {}
        for index in sorted(indices):
            try:
                found[index] = self.reason(index)
            except FileNotFoundError:  # done in a second attempt since
                continue
        return found

    def reason(self, index: int) -> str:
        """Why an image failed.

        Raises:
            FileNotFoundError: if it has not.
            StoreError: if the object that says so is damaged.
        """
        key = layout.failed_key(index)
        try:
            return str(unpacked(self._objects.read(key))["reason"])
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self._objects.url}: {key} is damaged ({error})") from error

    def marker(self, shard: int) -> Marker | None:
        """What the marker of a shard says; None if it is not sealed.

        Raises:
            StoreError: if the marker is damaged.
        """
        key = layout.sealed_key(shard)
        stamp = self._objects.stamp(key)  # before it is read: what is written meanwhile is read again next time
        kept = self._markers.get(shard)
        if kept is not None and kept[0] == stamp:
            return kept[1]
        self.forget(shard)
        try:
            content = unpacked(self._objects.read(key))
            records = {int(index): dict(record) for index, record in content["images"].items()}
            failed = {int(index): str(reason) for index, reason in content["failed"].items()}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{self._objects.url}: {key} is damaged ({error})") from error
        self._markers[shard] = stamp, Marker(records, failed)
        while len(self._markers) > _MARKERS_KEPT:
            self._markers.popitem(last=False)
        return self._markers[shard][1]

    def forget(self, shard: int) -> None:
        """Reads the marker of a shard anew when it is asked for next: the shard was, or may have been, opened again."""
        self._markers.pop(shard, None)

    def _numbers(self, folder: str) -> set[int]:
        return layout.numbers(self._objects.names(folder))
