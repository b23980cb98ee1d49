"""Photos of a run, and batches of views, read and rendered ahead of the steps that need them."""

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
from denoising_vit.errors import TrainError
from denoising_vit.training.pair_files import read_reasons, write_reason
from denoising_vit.training.samples import Sample
from denoising_vit.views.rendering import to_image

#: Number of decoding threads, and of decoded photos to keep ready.
_DECODERS, _DECODED = 4, 16

#: Seconds to wait before each retry of a photo that is unreachable.
_AGAIN = (1.0, 5.0, 25.0)


@dataclass(frozen=True)
class Seen:
    """A photo of a run.

    Attributes:
        index: its index in the data set.
        image: (3, H, W) in [0, 1], on the CPU.
        field: F on its nodes (Ry, Rx, C), on the CPU, in the stored dtype; None for photos without fields.
    """

    index: int
    image: Tensor
    field: Tensor | None


class SeenPhotos(Protocol):
    """Photos to train on, with or without their fields."""

    @property
    def ids(self) -> Sequence[str]:
        """Ids of all photos by index."""
        ...

    @property
    def images(self) -> Sequence[int]:
        """Indices of the photos to use."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that identify the photos."""
        ...

    def stream(self, images: Iterable[int], patience: Sequence[float] = ()) -> Iterator[Seen | Skipped]:
        """Photos in the given order, or the reason why one cannot be read.

        Args:
            images: indices of photos; may be endless.
            patience: seconds to wait before each retry of an unreachable photo.
        """
        ...


@dataclass(frozen=True)
class PlainPhotos:
    """Photos of a data set, without fields.

    Attributes:
        dataset: the data set.
    """

    dataset: Dataset

    @property
    def ids(self) -> Sequence[str]:
        """Ids of all photos by index."""
        return _Ids(self.dataset)

    @property
    def images(self) -> Sequence[int]:
        """All indices; unreadable photos are detected on reading."""
        return range(len(self.dataset))

    @property
    def identity(self) -> dict[str, Any]:
        """Number and names of the photos."""
        return {"images": len(self.dataset), "ids": self.dataset.digest}

    def stream(self, images: Iterable[int], patience: Sequence[float] = ()) -> Iterator[Seen | Skipped]:
        """Photos in the given order, or the reason why one cannot be read.

        Raises:
            TrainError: if a photo is still unreachable after all retries.
        """
        for index, found in self.dataset.stream(images, workers=_DECODERS, ahead=_DECODED, patience=patience):
            if not isinstance(found, Skipped):
                yield Seen(index, to_image(found), None)
            elif found.unreachable:
                raise TrainError(
                    f"{found.item}: unreachable ({found.reason}); continue from the last checkpoint with --resume"
                )
            else:
                yield found


@dataclass(frozen=True)
class Batch:
    """A batch of views of the same size.

    Attributes:
        samples: their samples.
        images: (B, 3, H, W), normalized.
        fields: F at their patches, (B, h, w, C) float32; None for photos without fields.
        usable: (B,) bool; False for an unreadable photo, whose view is zeros.
    """

    samples: list[Sample]
    images: Tensor
    fields: Tensor | None
    usable: Tensor


@dataclass
class ViewReader:
    """Reads photos and renders views of them.

    Attributes:
        photos: the photos.
        backbone: backbone whose normalization and patch grid to use.
        device: device to render on.
        sizes: (H, W) of the views.
        folder: folder to record unusable photos in, with reasons.
    """

    photos: SeenPhotos
    backbone: Backbone
    device: torch.device
    sizes: Sequence[tuple[int, int]]
    folder: Path
    _skipped: set[str] = field(default_factory=set, init=False)

    def stream(self, images: Iterable[int]) -> Iterator[Seen | Skipped]:
        """Photos in the given order, with retries."""
        return self.photos.stream(images, _AGAIN)

    def batches(self, plan: Iterable[list[Sample]]) -> Iterator[Batch]:
        """Batches of the samples, in order.

        Raises:
            TrainError: if a photo is unreachable, or a photo with a field is missing.
        """
        plan, again = itertools.tee(plan)
        seen = self.stream(sample.image for samples in again for sample in samples)
        for samples in plan:
            yield self._batch(samples, [next(seen) for _ in samples])

    @property
    def skipped(self) -> dict[str, str]:
        """Reasons why photos are unusable, by id; from all processes and earlier runs."""
        return read_reasons(self.folder)

    def _batch(self, samples: list[Sample], seen: Sequence[Seen | Skipped]) -> Batch:
        views, fields = [], []
        for sample, one in zip(samples, seen, strict=True):
            if isinstance(one, Skipped):
                self._record(one)
                views.append(torch.zeros(3, *self.sizes[sample.size], device=self.device))
                continue
            image = one.image.to(self.device)
            views.append(sample.crop.render(image, self.backbone.mean, self.backbone.std))
            if one.field is not None:
                fields.append(sample.crop.sample(one.field.float(), self.backbone.patch_size, self.backbone.stride))
        usable = torch.tensor([isinstance(one, Seen) for one in seen], device=self.device)
        return Batch(samples, torch.stack(views), torch.stack(fields) if fields else None, usable)

    def _record(self, skipped: Skipped) -> None:
        """Record the reason once per run instead of once per epoch."""
        if skipped.item in self._skipped:
            return
        self._skipped.add(skipped.item)
        if skipped.item not in read_reasons(self.folder):
            try:
                write_reason(self.folder, skipped.item, skipped.reason)
            except OSError as error:
                raise TrainError(f"{self.folder}: cannot be written to ({error}); continue with --resume") from error


class _Ids(Sequence[str]):
    """Ids of a data set, created on request because there may be millions."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index].id
