"""Views of photos, batch by batch: read and rendered ahead of the steps that need them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.data import Dataset, Skipped
from denoising_vit.denoiser.pairs import sampled
from denoising_vit.denoiser.targets import StoredTargets
from denoising_vit.errors import TrainError
from denoising_vit.training.pair_files import read_reasons, write_reason
from denoising_vit.training.samples import Sample
from denoising_vit.views.rendering import to_image

#: Decoding threads, and photos that wait decoded.
_DECODERS, _DECODED = 4, 16

#: Seconds that are waited before a photo is asked for again that could not be reached.
_AGAIN = (1.0, 5.0, 25.0)


@dataclass(frozen=True)
class Seen:
    """A photo that was read.

    Attributes:
        index: its place among all.
        image: (3, H, W) in [0, 1], on the CPU.
        field: F on its nodes (Ry, Rx, C), where fields are what is taught.
    """

    index: int
    image: Tensor
    field: Tensor | None = None


class SeenPhotos(Protocol):
    """Where photos come from."""

    @property
    def ids(self) -> Sequence[str]:
        """Names of all, in the order of their indices."""
        ...

    @property
    def images(self) -> Sequence[int]:
        """Indices of those that may be used."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What decides them; JSON values."""
        ...

    def stream(self, indices: Iterable[int]) -> Iterator[Seen | Skipped]:
        """Photos in the order asked for, or why there are none."""
        ...


@dataclass(frozen=True)
class PlainPhotos:
    """Photos of a folder, a list, or shards.

    Attributes:
        dataset: of the photos.
    """

    dataset: Dataset

    @property
    def ids(self) -> Sequence[str]:
        """Names of all."""
        return _Ids(self.dataset)

    @property
    def images(self) -> Sequence[int]:
        """All: whether one can be read is seen when its turn comes."""
        return range(len(self.dataset))

    @property
    def identity(self) -> dict[str, Any]:
        """How many, and their names."""
        return {"images": len(self.dataset), "ids": self.dataset.digest}

    def stream(self, indices: Iterable[int]) -> Iterator[Seen | Skipped]:
        """Photos in the order asked for, or why there are none.

        Raises:
            TrainError: if one cannot be reached at the moment, after several tries.
        """
        for index, found in self.dataset.stream(indices, workers=_DECODERS, ahead=_DECODED, patience=_AGAIN):
            if not isinstance(found, Skipped):
                yield Seen(index, to_image(found))
            elif found.unreachable:
                raise TrainError(
                    f"{found.item}: cannot be reached ({found.reason}); --resume goes on from the last checkpoint"
                )
            else:
                yield found


@dataclass(frozen=True)
class FittedPhotos:
    """Photos that stage 1 was fitted on, with their fields.

    Attributes:
        targets: of a store.
    """

    targets: StoredTargets

    @property
    def ids(self) -> Sequence[str]:
        """Names of all images of the store."""
        return self.targets.ids

    @property
    def images(self) -> Sequence[int]:
        """Those that have a field."""
        return self.targets.images

    @property
    def identity(self) -> dict[str, Any]:
        """Of store and photos."""
        return self.targets.identity

    def stream(self, indices: Iterable[int]) -> Iterator[Seen | Skipped]:
        """Photos with their fields.

        Raises:
            TrainError: if a field or a photo is gone; nothing takes its place.
        """
        for fitted in self.targets.stream(indices, patience=_AGAIN):
            yield Seen(fitted.index, fitted.image, fitted.field)


@dataclass(frozen=True)
class Batch:
    """Views of one size.

    Attributes:
        samples: what they show.
        images: (B, 3, H, W), normalised.
        fields: F at their patches, (B, h, w, C) float32, where fields are what is taught.
        usable: (B,) bool; a view of a photo that could not be read shows nothing.
    """

    samples: list[Sample]
    images: Tensor
    fields: Tensor | None
    usable: Tensor


@dataclass
class ViewReader:
    """Reads and renders views.

    Attributes:
        photos: where they come from.
        backbone: whose normalisation and patch grid they get.
        device: where views are rendered.
        sizes: (H, W) of the views.
        told: folder in which it is noted which photos cannot be used, and why.
    """

    photos: SeenPhotos
    backbone: Backbone
    device: torch.device
    sizes: Sequence[tuple[int, int]]
    told: Path
    _skipped: set[str] = field(default_factory=set, init=False)

    def batches(self, plan: Iterable[list[Sample]]) -> Iterator[Batch]:
        """Batches of these samples, in their order.

        Raises:
            TrainError: if a photo cannot be reached, or one with a field is gone.
        """
        asked, again = itertools.tee(plan)
        seen = self.photos.stream(sample.image for samples in asked for sample in samples)
        for samples in again:
            yield self._batch(samples, [next(seen) for _ in samples])

    @property
    def skipped(self) -> dict[str, str]:
        """Why photos could not be used, by id; of all processes, and of those before them."""
        return read_reasons(self.told)

    def _batch(self, samples: list[Sample], seen: Sequence[Seen | Skipped]) -> Batch:
        views, fields = [], []
        for sample, one in zip(samples, seen, strict=True):
            if isinstance(one, Skipped):
                self._note(one)
                views.append(torch.zeros(3, *self.sizes[sample.size], device=self.device))
                continue
            image = one.image.to(self.device)
            views.append(sample.crop.render(image, self.backbone.mean, self.backbone.std))
            if one.field is not None:
                fields.append(sampled(one.field, [sample.crop], self.backbone)[0])
        usable = torch.tensor([isinstance(one, Seen) for one in seen], device=self.device)
        return Batch(samples, torch.stack(views), torch.stack(fields) if fields else None, usable)

    def _note(self, skipped: Skipped) -> None:
        """Once, though every epoch comes by it."""
        if skipped.item in self._skipped:
            return
        self._skipped.add(skipped.item)
        if skipped.item not in read_reasons(self.told):
            try:
                write_reason(self.told, skipped.item, skipped.reason)
            except OSError as error:
                raise TrainError(f"{self.told}: cannot be written to ({error}); --resume goes on") from error


class _Ids(Sequence[str]):
    """Names of the items of a data set, made when asked for: there may be millions."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index].id
