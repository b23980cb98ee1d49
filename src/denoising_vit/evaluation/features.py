"""Features of image crops: batched forward passes, and a cache on disk."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from denoising_vit.decomposition.inputs import fitting_batch
from denoising_vit.errors import DenoisingVitWarning, EvaluationError
from denoising_vit.evaluation.data import JudgedImage
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.files import compact, digest, write_tensors
from denoising_vit.progress import prefetched
from denoising_vit.views.crops import Crop
from denoising_vit.views.patch_grid import check_side, nearest_sizes


class Patches(Protocol):
    """Whatever cuts images into patches: a backbone, a source of features."""

    patch_size: int
    stride: int


def shown_size(size: int | tuple[int, int] | None, image: JudgedImage, patches: Patches) -> tuple[int, int]:
    """(H, W) in pixels at which an image is shown.

    Raises:
        SizeError: if the size that is asked for does not fit the patch grid.
    """
    if size is None:
        return native_size(image.height, image.width, patches.patch_size, patches.stride)
    check_size(size, patches.patch_size, patches.stride)
    return (size, size) if isinstance(size, int) else size


def check_size(size: int | tuple[int, int] | None, patch_size: int, stride: int) -> None:
    """Refuses a size that is not covered by whole patches.

    Raises:
        SizeError: naming the nearest sides that are.
    """
    for side in () if size is None else (size,) if isinstance(size, int) else size:
        check_side(side, patch_size, stride)


def native_size(height: int, width: int, patch_size: int, stride: int) -> tuple[int, int]:
    """The nearest sides that fit the patch grid, the larger one of two that are as near."""
    down, across = (
        max(nearest_sizes(side, patch_size, stride), key=lambda fitting: (-abs(fitting - side), fitting))
        for side in (height, width)
    )
    return down, across


#: Hex digits in the names of cached files.
_DIGITS = 24


#: Most that a file takes besides its values.
_HEADER = 256


#: Batches that are rendered ahead where an accelerator does the forward passes.
_AHEAD = 3


#: One image and the crop of it that is looked at.
Shown = tuple[JudgedImage, Crop]


@dataclass
class FeatureCache:
    """Features on disk, one file a crop, until they take too much room.

    Attributes:
        folder: made where it does not exist.
        limit: bytes that the files may take in all.

    Raises:
        EvaluationError: if the folder cannot be made.
    """

    folder: Path
    limit: float = 10e9

    def __post_init__(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(
                f"cannot keep features in {self.folder} ({error.strerror or error}); choose another folder (--cache)"
            ) from error
        self._used = sum(path.stat().st_size for path in self.folder.rglob("*.safetensors"))

    def path(self, source: FeatureSource, shown: Shown) -> Path:
        """Where the features of a crop are, or would be."""
        image, crop = shown
        whose = digest({"name": source.name, "identity": source.identity, "backbone": source.backbone}, _DIGITS)
        return self.folder / whose / f"{digest({'image': image.digest, **asdict(crop)}, _DIGITS)}.safetensors"

    def get(self, path: Path) -> Tensor | None:
        """Features (h, w, C) float32, None where there are none or the file is damaged."""
        try:
            return load_file(path)["features"].float()
        except (OSError, SafetensorError, KeyError):
            return None

    def put(self, path: Path, features: Tensor) -> None:
        """Keeps features (h, w, C), in float16 where they fit, unless the room is used up."""
        kept = compact(features)
        size = kept.nbytes + _HEADER
        if self._used + size > self.limit:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors({"features": kept}, path)
        except OSError as error:
            self.limit = 0.0  # what is kept saves time only: the work goes on without
            warnings.warn(f"features are not kept on disk any more ({error})", DenoisingVitWarning, stacklevel=2)
            return
        self._used += size


def see(
    source: FeatureSource,
    shown: Sequence[Shown],
    cache: FeatureCache | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:
    """Features (h, w, C), float32 on the CPU, of each crop in turn.

    They are as float16 holds them wherever that has room for them, cached or not, so that a second run is the same.

    Args:
        source: of the features.
        shown: images and their crops.
        cache: where features are kept.
        progress: called after each crop.

    Raises:
        EvaluationError: if features are not finite, or no grid.
        PhotoError: if a photo cannot be read any more.
    """
    cache = cache if source.cached else None
    batches = _batches(source, shown, cache)
    with contextlib.closing(batches if source.device.type == "cpu" else prefetched(batches, _AHEAD)) as batches:
        for found, inputs, paths in batches:
            for features in _forward(source, found, inputs, paths, cache):
                progress()
                yield features


_Batch = tuple[Tensor | None, list[Tensor], list[Path | None]]


def _batches(
    source: FeatureSource, shown: Sequence[Shown], cache: FeatureCache | None
) -> Generator[_Batch, None, None]:
    """Either features that are there, or inputs of one size, as many as the device takes at once."""
    waiting: list[tuple[Tensor, Path | None]] = []

    def flush() -> Iterator[_Batch]:
        if waiting:
            yield None, [inputs for inputs, _ in waiting], [path for _, path in waiting]
            waiting.clear()

    for image, crop in shown:
        path = None if cache is None else cache.path(source, (image, crop))
        found = None if cache is None or path is None else cache.get(path)
        if found is not None:
            yield from flush()
            yield found, [], []
            continue
        inputs = source.inputs(image, crop)
        if waiting and waiting[0][0].shape != inputs.shape:
            yield from flush()
        waiting.append((inputs, path))
        tokens = math.prod(side // source.stride for side in crop.padded)
        if len(waiting) >= fitting_batch(source.device, max(tokens, 1)):
            yield from flush()
    yield from flush()


def _forward(
    source: FeatureSource,
    found: Tensor | None,
    inputs: list[Tensor],
    paths: list[Path | None],
    cache: FeatureCache | None,
) -> Iterator[Tensor]:
    if found is not None:
        yield found
        return
    for features, path in zip(source.features(torch.stack(inputs)).cpu(), paths, strict=True):
        if cache is not None and path is not None:
            cache.put(path, features)
        yield compact(features).float()
