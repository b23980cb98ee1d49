"""Targets of stage 2: semantic fields from a store, or fitted during the run."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from denoising_vit.artifact import artifact_digest
from denoising_vit.backbones import Backbone
from denoising_vit.backbones.recorded import describe, mismatch, same_weights
from denoising_vit.data import Dataset, Skipped
from denoising_vit.data.photos import photo_digest
from denoising_vit.decomposition.stage_one import Failed, StageOne
from denoising_vit.errors import StoreError, TrainError
from denoising_vit.files import digest
from denoising_vit.store import FeatureStore
from denoising_vit.training.photos import Seen
from denoising_vit.views.rendering import to_image

#: Maximum number of ids in a message.
_NAMED = 3


@dataclass(frozen=True)
class Fitted(Seen):
    """A photo with its semantic field."""

    field: Tensor


@dataclass(frozen=True)
class Unusable:
    """A photo that stage 1 could not fit.

    Attributes:
        index: its index in the data set.
        reason: reason of the failure.
    """

    index: int
    reason: str


class Targets(Protocol):
    """Photos and their fields."""

    @property
    def ids(self) -> Sequence[str]:
        """Ids of all photos by index."""
        ...

    @property
    def images(self) -> Sequence[int]:
        """Indices of the photos to use."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels of the fitted views."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that identify the targets."""
        ...

    def stream(self, images: Iterable[int]) -> Iterator[Fitted | Unusable]:
        """Photos with their fields, in the given order."""
        ...

    def photo(self, index: int) -> np.ndarray:
        """Pixels of a photo, (H, W, 3) uint8."""
        ...


class StoredTargets:
    """Fields of a store, with the photos that it was fitted on.

    Args:
        store: the store.
        photos: the photos, with the ids of the store.
        backbone: the backbone to train for.
        start: the same backbone with the distilled weights to train further, whose fields may also be the targets.

    Raises:
        TrainError: if the store was fitted with neither of these backbones, is not finished, or photos are missing.
    """

    def __init__(self, store: FeatureStore, photos: Dataset, backbone: Backbone, start: Backbone | None = None) -> None:
        recorded = store.manifest.backbone
        self._of_start = not same_weights(recorded, describe(backbone))
        if self._of_start and (start is None or not same_weights(recorded, describe(start))):
            remedy = "Use the store's backbone, or fit a new store with this one"
            if start is not None:
                remedy += ", or with the weights of --start"
            raise TrainError(mismatch(f"{store.url}: the store was fitted with", recorded, backbone, remedy))
        done, failed = store.done(), store.failed()
        unfinished = [index for index in range(len(store)) if index not in done and index not in failed]
        if unfinished:
            raise TrainError(
                f"{store.url}: {len(unfinished)} of {len(store)} images have no target yet "
                f"({_named(store.ids, unfinished)}); finish `dvit fit` first"
            )
        self.store, self.photos = store, photos
        self.images = tuple(sorted(done))
        self._places = {item.id: place for place, item in enumerate(photos)}
        missing = [index for index in self.images if store.ids[index] not in self._places]
        if missing:
            raise TrainError(
                f"{photos.source}: {len(missing)} of the store's {len(store)} photos are missing "
                f"({_named(store.ids, missing)}); expected the photos that {store.url} was fitted on"
            )

    @property
    def ids(self) -> Sequence[str]:
        """Ids of all photos of the store."""
        return self.store.ids

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels of the fitted views."""
        return self.store.manifest.size

    @property
    def identity(self) -> dict[str, Any]:
        """Plan and options of the fit, and digests of the photos.

        Raises:
            StoreError: if the records of the store are damaged.
        """
        manifest = self.store.manifest
        fitted = {
            "plan": manifest.plan,
            "options": manifest.options,
            "nodes": list(manifest.field),
            "images": len(self.images),
            "ids": manifest.ids_digest,
            "photos": self._pictures,
        }
        return fitted | ({"fitted with": "the weights to start from"} if self._of_start else {})

    @cached_property
    def _pictures(self) -> str:
        """SHA-256 of the photos' digests, because other photos may have the same names."""
        return digest([[index, self._record(index).get("photo", {}).get("sha256")] for index in self.images])

    def _record(self, index: int) -> dict[str, Any]:
        """The record of a photo; a sealed shard has all records in one small object, so no field is read."""
        marker = self.store.marker(self.store.manifest.shard_of(index))
        if marker is not None and index in marker.records:
            return marker.records[index]
        return self.store.read(index)[1]  # the shard was not sealed because of a crash

    @property
    def keeps_fields(self) -> bool:
        """True if the field has more nodes than patches, which crops require."""
        return min(self.store.manifest.field) > min(self.store.manifest.grid)

    def stream(self, images: Iterable[int], patience: Sequence[float] = ()) -> Generator[Fitted, None, None]:
        """Photos with their fields, in the given order.

        Args:
            images: indices; may be endless.
            patience: seconds to wait before each retry of an unreachable photo.

        Raises:
            TrainError: if a target or photo is missing, or the photo has changed since the fit.
        """
        wanted, again = itertools.tee(images)
        places = (self._places[self.ids[index]] for index in again)
        for index, (_, pixels) in zip(wanted, self.photos.stream(places, patience=patience), strict=True):
            yield self._fitted(index, pixels)

    def photo(self, index: int) -> np.ndarray:
        """Pixels of a photo, (H, W, 3) uint8.

        Raises:
            PhotoError: if it cannot be read.
        """
        return self.photos.read(self._places[self.ids[index]])

    def _fitted(self, index: int, pixels: np.ndarray | Skipped) -> Fitted:
        name = self.ids[index]
        if isinstance(pixels, Skipped):
            more = "; continue from the last checkpoint with --resume" if pixels.unreachable else ""
            raise TrainError(f"{name}: the target's photo cannot be read ({pixels.reason}){more}")
        try:
            field, record = self.store.read(index)
        except StoreError as error:
            raise TrainError(f"{name}: the target is missing ({error})") from error
        recorded = record.get("photo", {}).get("sha256")
        if recorded is not None and recorded != photo_digest(pixels):
            raise TrainError(
                f"{name}: the photo differs from the one that the store was fitted on; restore the original photo, or "
                "fit the current photos into a new store"
            )
        return Fitted(index, to_image(pixels), torch.from_numpy(field))


class FittedTargets:
    """Fields fitted on request, without a store.

    Args:
        stage: the exact solver.
        photos: the photos.
    """

    def __init__(self, stage: StageOne, photos: Dataset) -> None:
        self.stage, self.photos = stage, photos
        self.images = tuple(range(len(photos)))
        self._ids = tuple(item.id for item in photos)

    @property
    def ids(self) -> Sequence[str]:
        """Ids of all photos."""
        return self._ids

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels of the fitted views."""
        return self.stage.fitted.size

    @property
    def identity(self) -> dict[str, Any]:
        """Plan and options of the fit, and the names of the photos."""
        return {
            "plan": self.stage.fitted.digest,
            "options": self.stage.options.recorded() | {"artifact": artifact_digest(self.stage.artifact)},
            "nodes": list(self.stage.fitted.resolution),
            "images": len(self.photos),
            "ids": self.photos.digest,
        }

    def stream(self, images: Iterable[int]) -> Generator[Fitted | Unusable, None, None]:
        """Fit photos in the given order; yields the reason for a photo that cannot be fitted.

        Raises:
            TrainError: if a photo is temporarily unreachable.
        """
        waiting: dict[int, Tensor] = {}

        def photos() -> Iterator[tuple[int, str, np.ndarray | Skipped]]:
            for index, pixels in self.photos.stream(images):
                if not isinstance(pixels, Skipped):
                    waiting[index] = to_image(pixels)
                yield index, self.photos[index].id, pixels

        for result in self.stage.run(photos()):
            if isinstance(result, Failed):
                waiting.pop(result.index, None)
                if not result.final:
                    raise TrainError(f"{result.name}: unreachable ({result.reason}); try again with --resume")
                yield Unusable(result.index, result.reason)
                continue
            done = result.finish()
            yield Fitted(done.index, waiting.pop(done.index), done.field)

    def photo(self, index: int) -> np.ndarray:
        """Pixels of a photo, (H, W, 3) uint8.

        Raises:
            PhotoError: if it cannot be read.
        """
        return self.photos.read(index)


def _named(ids: Sequence[str], indices: Sequence[int]) -> str:
    more = f", and {len(indices) - _NAMED} more" if len(indices) > _NAMED else ""
    return ", ".join(ids[index] for index in indices[:_NAMED]) + more
