"""Stage 1 of a data set's images: fitted once into stores that later runs reuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from denoising_vit.artifact import KnownArtifact, artifact_digest
from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.backbones.recorded import weights_key
from denoising_vit.data import Dataset, Item
from denoising_vit.decomposition.inputs import given_artifact
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import EvaluationData, EvaluationImage, EvaluationSet, described
from denoising_vit.evaluation.features import Shown, native_size
from denoising_vit.evaluation.sources import FieldSource
from denoising_vit.files import atomic_path, digest
from denoising_vit.fit.job import FitJob
from denoising_vit.fit.options import FitOptions
from denoising_vit.progress import Progress, no_progress
from denoising_vit.store import FeatureStore


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
            index, reason = next(iter(sorted(failed.items())))
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
    whose = asdict(spec) | {"digest": weights_key(backbone), "images": images.photos_digest}
    return f"{images.split}-{digest(identity | whose, 16)}"


def _common_size(data: EvaluationData, backbone: Backbone) -> tuple[int, int]:
    """The common size of all images, rounded to the patch grid; the backbone's default size if they differ."""
    match list({images.common_size for images in data.splits}):
        case [(height, width)]:
            return native_size(height, width, backbone.patch_size, backbone.stride)
    return backbone.default_size, backbone.default_size
