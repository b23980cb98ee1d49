"""Features that later runs reuse: forward passes over crops with a cache on disk, and stage 1 fitted into stores."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from denoising_vit.artifact import KnownArtifact, artifact_digest
from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.backbones.recorded import weights_key
from denoising_vit.data import Dataset, Item
from denoising_vit.decomposition.inputs import fitting_batch, given_artifact
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.errors import DenoisingVitWarning, EvaluationError
from denoising_vit.evaluation.data import EvaluationData, EvaluationImage, EvaluationSet, described
from denoising_vit.evaluation.patches import native_size
from denoising_vit.evaluation.sources import FeatureSource, FieldSource
from denoising_vit.files import atomic_path, compact, digest, write_tensors
from denoising_vit.fit.job import FitJob
from denoising_vit.fit.options import FitOptions
from denoising_vit.progress import Progress, no_progress, prefetched
from denoising_vit.store import FeatureStore
from denoising_vit.views.crops import Crop

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
        key = digest({"name": source.name, "identity": source.identity, "backbone": source.backbone}, _DIGITS)
        return self.folder / key / f"{digest({'image': image.digest, **asdict(crop)}, _DIGITS)}.safetensors"

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


# --- stage 1 ---


def fitted_fields(
    name: str,
    data: EvaluationData,
    folder: Path,
    backbone: Backbone,
    spec: BackboneSpec,
    options: DenoiseOptions,
    *,
    artifact: KnownArtifact | None = None,
    crops: Mapping[str, Sequence[Shown]] | None = None,
    progress: Progress = no_progress,
) -> FieldSource:
    """Semantic fields of all images, fitted if they are not stored yet.

    Without a size in the options, views have the common size of the images, or the backbone's default size if sizes
    differ. If there are crops by split, each crop is fitted as an image of its own.

    Raises:
        EvaluationError: if an image could not be fitted.
        FitError: if there is not enough disk space.
        PlanError: if there are too few views.
    """
    options = replace(options, size=options.size or _common_size(data, backbone))  # one plan for all images
    known = given_artifact(artifact, backbone, options)
    identity: dict[str, Any] = options.recorded("nothing") | {"artifact": artifact_digest(known), "size": options.size}
    splits = list(data.splits)
    if crops is not None:
        identity["of"] = "crop"
        splits = [_cut(images, crops[images.split], folder) for images in splits]

    def fitted(images: EvaluationSet[EvaluationImage]) -> FeatureStore:
        items = [Item(image.id, str(image.photo)) for image in images.images]
        dataset = Dataset(f"{images.split} images", items)
        store = folder / store_name(images, backbone, spec, identity)
        job = FitJob.prepare(dataset, store, spec, options, FitOptions(retry_failed=True), artifact, backbone)
        with progress(f"{name}: {images.split} images fitted", len(items)) as advance:
            for _ in job.store.done():
                advance()
            job.run(lambda _index, _reason: advance())
        if failed := job.store.failed():
            index, reason = min(failed.items())
            raise EvaluationError(
                f"{len(failed)} {images.split} images could not be fitted, so they cannot be evaluated; "
                f"{items[index].id}: {reason}"
            )
        return job.store

    folder.mkdir(parents=True, exist_ok=True)
    stores = {images.split: fitted(images) for images in splits}
    return FieldSource(name, backbone, stores, identity, of_crops=crops is not None)


def _cut(
    images: EvaluationSet[EvaluationImage], shown: Sequence[Shown], folder: Path
) -> EvaluationSet[EvaluationImage]:
    """Save crops as images with the ids of their source images."""
    cut = []
    for image, crop in shown:
        pixels = np.ascontiguousarray(crop.cut(image.pixels()))
        about = described(image.split, image.id, image.photo, pixels)
        path = folder / "crops" / f"{about['digest'][:24]}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                Image.fromarray(pixels).save(temporary, "PNG")
        cut.append(replace(image, **about | {"photo": path}))
    return replace(images, images=tuple(cut))


def store_name(
    images: EvaluationSet[EvaluationImage], backbone: Backbone, spec: BackboneSpec, identity: dict[str, Any]
) -> str:
    """Name of a store; the same fields of the same photos have the same name in all tasks."""
    settings = identity | asdict(spec) | {"digest": weights_key(backbone), "images": images.photos_digest}
    return f"{images.split}-{digest(settings, 16)}"


def _common_size(data: EvaluationData, backbone: Backbone) -> tuple[int, int]:
    """The common size of all images, rounded to the patch grid; the backbone's default size if they differ."""
    common = data.splits[0].common_size
    if common is None or any(images.common_size != common for images in data.splits):
        return backbone.default_size, backbone.default_size
    height, width = common
    return native_size(height, width, backbone)
