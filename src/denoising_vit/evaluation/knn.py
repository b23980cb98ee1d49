"""Nearest-neighbour segmentation: what features say of classes without any training (the paper's table 5)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.features import FeatureCache, Patches, Shown, see, shown_size
from denoising_vit.evaluation.labelled import LabelledData, LabelledImage, LabelledSet
from denoising_vit.evaluation.masks import NO_LABEL
from denoising_vit.evaluation.options import (
    KnnOptions,
)
from denoising_vit.evaluation.patches import commonest, nearest, patch_counts
from denoising_vit.evaluation.scores import Counts, count
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.views.crops import Crop

#: Added to the seed for the crops of the images that are judged, so that they are others than the gallery's.
_VAL_SEED = 1_000_003

_SeeAll = Callable[[FeatureSource, Sequence[Shown]], Iterator[Tensor]]


def nearest_neighbours(
    source: FeatureSource,
    data: LabelledData,
    options: KnnOptions,
    *,
    cache: FeatureCache | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Counts:
    """Labels each patch of the images of ``val`` by the patches of ``train`` whose features are nearest (cosine).

    Args:
        source: of the features.
        data: the labelled images.
        options: how.
        cache: where features are kept.
        progress: called after each image.

    Returns:
        Counts over patches that have a label, image by image.

    Raises:
        EvaluationError: if the gallery has fewer labelled patches than neighbours are asked for, or features are not
            finite.
    """
    options.validate()
    see_all: _SeeAll = functools.partial(see, cache=cache, progress=progress)
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
    """What is shown of each image: other neutral crops in ``val`` than in ``train``."""
    offset = _VAL_SEED if images.split == "val" else 0
    shown = []
    for number, image in enumerate(images.images):
        size = shown_size(options.size, image, patches)
        crop = Crop.whole(size)
        if options.crops == "neutral":
            crop = Crop.neutral(number, size, options.seed + offset).snapped(image.height, image.width)
        shown.append((image, crop))
    return shown


def vote(queries: Tensor, gallery: Tensor, labels: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """Classes (Q,) of queries (Q, C) by the k nearest of a gallery (N, C), normalised, with labels (N,)."""
    similarity, found = nearest(queries, gallery, k)
    weights = (similarity / temperature).softmax(-1)
    votes = torch.zeros(len(queries), classes, device=queries.device)
    return votes.scatter_add_(1, labels[found], weights).argmax(-1)


def _gallery(source: FeatureSource, train: LabelledSet, options: KnnOptions, see_all: _SeeAll) -> tuple[Tensor, Tensor]:
    """Normalised features (N, C) and labels (N,) of the patches that are compared with."""
    shown = crops_of(train, source, options)
    generator = torch.Generator().manual_seed(options.seed)
    found, labels = [], []
    for number, ((image, crop), features) in enumerate(zip(shown, see_all(source, shown), strict=True)):
        label = _labels(source, image, crop).flatten()
        until, start = (options.gallery * n // len(shown) for n in (number + 1, number))
        most = until - start if options.gallery else None
        known = torch.nonzero(label != NO_LABEL).flatten()
        known = known[torch.randperm(len(known), generator=generator)[:most]]
        found.append(F.normalize(features.flatten(0, 1)[known], dim=-1))
        labels.append(label[known])
    gallery, label = torch.cat(found).to(source.device), torch.cat(labels).to(source.device)
    if len(gallery) < options.k:
        raise EvaluationError(
            f"a gallery of {len(gallery)} labelled patches is less than the {options.k} neighbours that vote; give "
            "more images, larger ones (--size), a larger --gallery or a smaller --k"
        )
    return gallery, label


def _labels(source: FeatureSource, image: LabelledImage, crop: Crop) -> Tensor:
    """(h, w) classes of the patches of a crop."""
    return commonest(patch_counts(image.labels(), crop, image.classes, source.patch_size, source.stride))
