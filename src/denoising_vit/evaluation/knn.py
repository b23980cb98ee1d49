"""Nearest-neighbour segmentation: patches take the classes of the nearest training patches (table 5 of the paper)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.features import FeatureCache, Patches, See, see, whole_images
from denoising_vit.evaluation.labelled import LabelledData, LabelledImage, LabelledSet
from denoising_vit.evaluation.masks import NO_LABEL
from denoising_vit.evaluation.options import KnnOptions
from denoising_vit.evaluation.patches import commonest, nearest, patch_counts, quota
from denoising_vit.evaluation.scores import Counts, count
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.evaluation.workbench import Line, Workbench
from denoising_vit.views.crops import Crop

#: Added to the seed for the crops of val, so that they differ from those of train.
_VAL_SEED = 1_000_003


def knn(bench: Workbench, names: Sequence[str], options: KnnOptions) -> Iterator[Line]:
    """Evaluate nearest-neighbour segmentation on each source, with the first as the reference."""
    options.validate()
    data = bench.labelled
    crops, neutral = None, options.crops == "neutral"
    if neutral and bench.fields_of == "crop":
        crops = {images.split: crops_of(images, bench.backbone, options) for images in data.splits}
    of_crops = {"crops": crops, "whole_fields": neutral and crops is None}
    yield from bench.compare(names, bench.untrained("knn", nearest_neighbours, data, options, **of_crops))


def nearest_neighbours(
    source: FeatureSource,
    data: LabelledData,
    options: KnnOptions,
    *,
    cache: FeatureCache | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Counts:
    """Label each patch of ``val`` by the patches of ``train`` with the nearest features (cosine).

    Raises:
        EvaluationError: if the gallery has fewer labelled patches than ``k``, or features are not finite.
    """
    options.validate()
    see_all: See = functools.partial(see, cache=cache, progress=progress)
    classes = len(data.train.class_names)
    gallery, labels = _gallery(source, data.train, options, see_all)
    found = []
    shown = crops_of(data.val, source, options)
    for (image, crop), features in zip(shown, see_all(source, shown), strict=True):
        truth = _labels(source, image, crop).flatten()
        known = truth != NO_LABEL
        if not known.any():
            found.append(Counts.nothing(classes))
            continue
        queries = features.flatten(0, 1)[known]  # (h, w, C) -> (q, C)
        predicted = vote(queries.to(gallery), gallery, labels, classes, options.k, options.temperature)
        found.append(count(predicted.cpu(), truth[known], classes))
    return Counts.joined(found)


def crops_of(images: LabelledSet, patches: Patches, options: KnnOptions) -> list[tuple[LabelledImage, Crop]]:
    """The crop of each image; neutral crops of ``val`` differ from those of ``train``."""
    shown = whole_images(images.images, options.size, patches)
    if options.crops == "whole":
        return shown
    seed = options.seed + (_VAL_SEED if images.split == "val" else 0)
    return [
        (image, Crop.neutral(number, crop.size, seed).snapped(image.height, image.width))
        for number, (image, crop) in enumerate(shown)
    ]


def vote(queries: Tensor, gallery: Tensor, labels: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """Classes (Q,) of queries (Q, C) by votes of the k nearest of a normalised gallery (N, C) with labels (N,)."""
    similarity, found = nearest(queries, gallery, k)
    weights = (similarity / temperature).softmax(-1)
    votes = torch.zeros(len(queries), classes, device=queries.device)
    return votes.scatter_add_(1, labels[found], weights).argmax(-1)


def _gallery(source: FeatureSource, train: LabelledSet, options: KnnOptions, see_all: See) -> tuple[Tensor, Tensor]:
    """Normalised features (N, C) and labels (N,) of the gallery."""
    shown = crops_of(train, source, options)
    generator = torch.Generator().manual_seed(options.seed)
    found, labels = [], []
    for number, ((image, crop), features) in enumerate(zip(shown, see_all(source, shown), strict=True)):
        label = _labels(source, image, crop).flatten()
        known = torch.nonzero(label != NO_LABEL).flatten()
        order = torch.randperm(len(known), generator=generator)
        known = known[order[: quota(options.gallery, number, len(shown))]]
        found.append(F.normalize(features.flatten(0, 1)[known], dim=-1))
        labels.append(label[known])
    gallery, label = torch.cat(found).to(source.device), torch.cat(labels).to(source.device)
    if len(gallery) < options.k:
        raise EvaluationError(
            f"the gallery has {len(gallery)} labelled patches, fewer than the {options.k} neighbours; give "
            "more images, larger images (--size), a larger --gallery or a smaller --k"
        )
    return gallery, label


def _labels(source: FeatureSource, image: LabelledImage, crop: Crop) -> Tensor:
    """Classes (h, w) of the patches of a crop."""
    return commonest(patch_counts(image.labels(), crop, image.classes, source.patch_size, source.stride))
