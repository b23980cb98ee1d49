"""Features of image crops: batched forward passes, and a cache on disk."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from denoising_vit.decomposition.inputs import fitting_batch
from denoising_vit.errors import DenoisingVitWarning, EvaluationError
from denoising_vit.evaluation.data import EvaluationImage
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.files import compact, digest, write_tensors
from denoising_vit.progress import prefetched
from denoising_vit.views.crops import Crop
from denoising_vit.views.patch_grid import check_side, nearest_sizes


class Patches(Protocol):
    """A backbone or a source of features."""

    patch_size: int
    stride: int


def shown_size(size: int | tuple[int, int] | None, image: EvaluationImage, patches: Patches) -> tuple[int, int]:
    """(H, W) in pixels of the model's input for an image: the given size, or its own, rounded to the patch grid."""
    if size is None:
        return native_size(image.height, image.width, patches.patch_size, patches.stride)
    check_size(size, patches.patch_size, patches.stride)
    return (size, size) if isinstance(size, int) else size


def check_size(size: int | tuple[int, int] | None, patch_size: int, stride: int) -> None:
    """Raise SizeError with the nearest valid sides unless whole patches cover the size."""
    for side in () if size is None else (size,) if isinstance(size, int) else size:
        check_side(side, patch_size, stride)


def native_size(height: int, width: int, patch_size: int, stride: int) -> tuple[int, int]:
    """The nearest sides that fit the patch grid; of two equally near sides, the larger."""
    down, across = (
        max(nearest_sizes(side, patch_size, stride), key=lambda fitting: (-abs(fitting - side), fitting))
        for side in (height, width)
    )
    return down, across


#: Hex digits in the names of cached files.
_DIGITS = 24

#: Maximum overhead of a cached file besides its values, in bytes.
_HEADER = 256

#: Batches rendered ahead of the forward passes on an accelerator.
_AHEAD = 3

#: An image and a crop of it.
Shown = tuple[EvaluationImage, Crop]

#: :func:`see` with its cache and progress already set.
See = Callable[[FeatureSource, Sequence[Shown]], Iterator[Tensor]]

Image = TypeVar("Image", bound=EvaluationImage)


def whole_images(
    images: Sequence[Image], size: int | tuple[int, int] | None, patches: Patches
) -> list[tuple[Image, Crop]]:
    """Images, each as one crop, at a size that fits the patch grid; with None, at their own size."""
    return [(image, Crop.whole(shown_size(size, image, patches))) for image in images]


@dataclass
class FeatureCache:
    """Features on disk, one file per crop, up to a total size.

    Attributes:
        folder: folder of the files, created if it does not exist; EvaluationError if that fails.
        limit: maximum size of all files in bytes.
    """

    folder: Path
    limit: float = 10e9

    def __post_init__(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(
                f"cannot cache features in {self.folder} ({error.strerror or error}); choose another folder (--cache)"
            ) from error
        self._used = sum(path.stat().st_size for path in self.folder.rglob("*.safetensors"))

    def path(self, source: FeatureSource, shown: Shown) -> Path:
        """File of the features of a crop."""
        image, crop = shown
        whose = digest({"name": source.name, "identity": source.identity, "backbone": source.backbone}, _DIGITS)
        return self.folder / whose / f"{digest({'image': image.digest, **asdict(crop)}, _DIGITS)}.safetensors"

    def get(self, path: Path) -> Tensor | None:
        """Features (h, w, C) float32; None if the file is missing or damaged."""
        try:
            return load_file(path)["features"].float()
        except (OSError, SafetensorError, KeyError):
            return None

    def put(self, path: Path, features: Tensor) -> None:
        """Save features (h, w, C), in float16 if within its range, unless the limit is reached."""
        kept = compact(features)
        size = kept.nbytes + _HEADER
        if self._used + size > self.limit:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors({"features": kept}, path, durable=False)
        except OSError as error:
            self.limit = 0.0  # the cache only saves time: continue without it
            warnings.warn(f"features are no longer cached on disk ({error})", DenoisingVitWarning, stacklevel=2)
            return
        self._used += size


def see(
    source: FeatureSource,
    shown: Sequence[Shown],
    cache: FeatureCache | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:
    """Features (h, w, C), float32 on the CPU, of each crop in turn.

    Cached or not, features are rounded to float16 if within its range, so that a second run gives the same result.
    Features cleaned from raw ones share the raw features' forward passes and are cleaned again each time.

    Raises:
        EvaluationError: if features are not finite or not a grid.
        PhotoError: if a photo can no longer be read.
    """
    if (raw := source.raw) is not None:
        for features in see(raw, shown, cache, progress):
            yield compact(source.cleaned(features)).float()
        return
    cache = cache if source.cached else None
    batches = _batches(source, shown, cache)
    with contextlib.closing(batches if source.device.type == "cpu" else prefetched(batches, _AHEAD)) as batches:
        for found, waiting in batches:
            for features in [found] if found is not None else _forward(source, waiting, cache):
                progress()
                yield features


_Waiting = list[tuple[Tensor, Path | None]]
_Batch = tuple[Tensor | None, _Waiting]


def _batches(
    source: FeatureSource, shown: Sequence[Shown], cache: FeatureCache | None
) -> Generator[_Batch, None, None]:
    """Cached features, or inputs of one size, up to as many as the device takes at once."""
    waiting: _Waiting = []

    def flush() -> Iterator[_Batch]:
        if waiting:
            yield None, waiting.copy()
            waiting.clear()

    for image, crop in shown:
        path = cache.path(source, (image, crop)) if cache else None
        found = cache.get(path) if cache and path else None
        if found is not None:
            yield from flush()
            yield found, []
            continue
        inputs = source.inputs(image, crop)
        if waiting and waiting[0][0].shape != inputs.shape:
            yield from flush()
        waiting.append((inputs, path))
        tokens = math.prod(side // source.stride for side in crop.padded)
        if len(waiting) >= fitting_batch(source.device, max(tokens, 1)):
            yield from flush()
    yield from flush()


def _forward(source: FeatureSource, waiting: _Waiting, cache: FeatureCache | None) -> Iterator[Tensor]:
    inputs = torch.stack([inputs for inputs, _ in waiting])
    for features, (_, path) in zip(source.features(inputs).cpu(), waiting, strict=True):
        if cache and path:
            cache.put(path, features)
        yield compact(features).float()
