"""Stage 1 of the images of a data set: fitted once into stores, which later runs find again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from denoising_vit.artifact import KnownArtifact, artifact_digest
from denoising_vit.backbones import Backbone, BackboneSpec
from denoising_vit.backbones.recorded import weights_key
from denoising_vit.data import Dataset, Item
from denoising_vit.data.photos import photo_digest
from denoising_vit.decomposition.inputs import given_artifact
from denoising_vit.decomposition.options import DenoiseOptions
from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import JudgedData, JudgedImage, JudgedSet
from denoising_vit.evaluation.features import Shown, native_size
from denoising_vit.evaluation.sources import FieldSource
from denoising_vit.files import atomic_path, digest
from denoising_vit.fit.job import FitJob
from denoising_vit.fit.options import FitOptions
from denoising_vit.store import FeatureStore

#: Called with the split that is being fitted, images done, and images in all.
OnFitted = Callable[[str, int, int], None]


def fitted_fields(
    name: str,
    data: JudgedData,
    folder: Path,
    backbone: Backbone,
    spec: BackboneSpec,
    options: DenoiseOptions,
    *,
    artifact: KnownArtifact | None = None,
    crops: Mapping[str, Sequence[Shown]] | None = None,
    on_fitted: OnFitted = lambda *_: None,
) -> FieldSource:
    """The semantic fields of all images, fitted where they are not there yet.

    Args:
        name: of the source.
        data: the images.
        folder: where the stores are.
        backbone: the extractor.
        spec: the same in words.
        options: of stage 1. Without a size, views have that of the images where all have one, and the backbone's own
            otherwise.
        artifact: G where it is known, as `denoise_image` takes it.
        crops: by split, what is shown of each image; where given, each is fitted as an image of its own.
        on_fitted: called after each image.

    Raises:
        EvaluationError: if an image could not be fitted.
        FitError: if there is no room.
        PlanError: if the views do not suffice.
    """
    options = replace(options, size=options.size or _common_size(data, backbone))  # one plan serves all
    known = given_artifact(artifact, backbone, options)
    identity: dict[str, Any] = options.recorded("nothing") | {"artifact": artifact_digest(known), "size": options.size}
    splits = list(data.splits)
    if crops is not None:
        identity["of"] = "crop"
        splits = [_cut(images, crops[images.split], folder) for images in splits]
    stores = {
        images.split: _fitted(images, folder, backbone, spec, options, artifact, identity, on_fitted)
        for images in splits
    }
    return FieldSource(name, backbone, stores, identity, of_crops=crops is not None)


def _cut(images: JudgedSet[JudgedImage], shown: Sequence[Shown], folder: Path) -> JudgedSet[JudgedImage]:
    """The crops as images: written to the folder, under the ids of the images that they are of."""
    cut = []
    for image, crop in shown:
        pixels = np.ascontiguousarray(crop.cut(image.pixels()))
        digest = photo_digest(pixels)
        path = folder / "crops" / f"{digest[:24]}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                Image.fromarray(pixels).save(temporary, "PNG")
        height, width = pixels.shape[:2]
        cut.append(replace(image, photo=path, digest=digest, height=height, width=width))
    return replace(images, images=tuple(cut))


def _fitted(
    images: JudgedSet[JudgedImage],
    folder: Path,
    backbone: Backbone,
    spec: BackboneSpec,
    options: DenoiseOptions,
    artifact: KnownArtifact | None,
    identity: dict[str, Any],
    on_fitted: OnFitted,
) -> FeatureStore:
    folder.mkdir(parents=True, exist_ok=True)
    items = [Item(image.id, str(image.photo)) for image in images.images]
    dataset = Dataset(f"{images.split} images", items)
    store = folder / store_name(images, backbone, spec, identity)
    job = FitJob.prepare(dataset, store, spec, options, FitOptions(retry_failed=True), artifact)
    done = len(job.store.done())
    on_fitted(images.split, done, len(items))

    def fitted(_index: int, _reason: str | None) -> None:
        nonlocal done
        done += 1
        on_fitted(images.split, done, len(items))

    job.run(fitted)
    if failed := job.store.failed():
        index, reason = next(iter(sorted(failed.items())))
        raise EvaluationError(
            f"{len(failed)} {images.split} images could not be fitted, so they cannot be judged; {items[index].id}: "
            f"{reason}"
        )
    return job.store


def store_name(images: JudgedSet[JudgedImage], backbone: Backbone, spec: BackboneSpec, identity: dict[str, Any]) -> str:
    """The same for the same fields of the same photos, whatever is judged on them."""
    whose = asdict(spec) | {"digest": weights_key(backbone), "images": images.photos_digest}
    return f"{images.split}-{digest(identity | whose, 16)}"


def _common_size(data: JudgedData, backbone: Backbone) -> tuple[int, int]:
    """The size of all images, rounded to the patch grid; the backbone's own where they differ."""
    sizes = {images.common_size for images in data.splits}
    size = sizes.pop() if len(sizes) == 1 else None
    if size is None:
        return backbone.default_size, backbone.default_size
    return native_size(*size, backbone.patch_size, backbone.stride)
