"""Tasks by nearest neighbours: segmentation of patches (table 5 of the paper), and dense retrieval at pixels.

Dense retrieval ("Hummingbird", Balazevic et al. 2023) is as in open-hummingbird-eval.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.features import FeatureCache, See, see
from denoising_vit.evaluation.labelled import LabelledData, LabelledImage, LabelledSet
from denoising_vit.evaluation.masks import NO_LABEL
from denoising_vit.evaluation.options import HummingbirdOptions, KnnOptions
from denoising_vit.evaluation.patches import Patches, at_places, commonest, nearest, patch_counts, quota, whole_images
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
    _require("gallery", len(gallery), options.k)
    return gallery, label


def _labels(source: FeatureSource, image: LabelledImage, crop: Crop) -> Tensor:
    """Classes (h, w) of the patches of a crop."""
    return commonest(patch_counts(image.labels(), crop, image.classes, *source.patch))


def _require(bank: str, patches: int, k: int) -> None:
    if patches < k:
        others = " of other images" if bank == "memory" else ""
        raise EvaluationError(
            f"the {bank} has {patches} labelled patches{others}, fewer than the {k} neighbours; give more images, "
            f"larger images (--size), a larger --{bank} or a smaller --k"
        )


# --- dense retrieval ---


def hummingbird(bench: Workbench, names: Sequence[str], options: HummingbirdOptions) -> Iterator[Line]:
    """Evaluate dense retrieval on each source, with the first as the reference."""
    options.validate()
    yield from bench.compare(names, bench.untrained("hummingbird", retrieved, bench.labelled, options))


@dataclass(frozen=True, eq=False)
class Memory:
    """Memory bank of training patches.

    Attributes:
        features: (N, C), normalised.
        labels: (N, K), class distribution over each patch's labelled pixels.
        photos: (N,), number of each patch's photo.
        numbers: number of each photo by digest; copies of a photo have the same number.
    """

    features: Tensor
    labels: Tensor
    photos: Tensor
    numbers: Mapping[str, int]

    def others(self, digest: str) -> Tensor:
        """(N,) bool: True for patches of photos other than the one with this digest."""
        return self.photos != self.numbers.get(digest, -1)

    def retrieve(self, queries: Tensor, k: int, temperature: float, without: Tensor | None = None) -> Tensor:
        """Soft labels (Q, K) of features (Q, C): the mean over the k nearest, weighted by softmax(cosine / T)."""
        similarity, rows = nearest(queries, self.features, k, without)
        weights = (similarity / temperature).softmax(-1)
        return torch.einsum("qk,qkc->qc", weights, self.labels[rows])


def retrieved(
    source: FeatureSource,
    data: LabelledData,
    options: HummingbirdOptions,
    *,
    cache: FeatureCache | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Counts:
    """Label each pixel of ``val`` by the patches of ``train`` with the nearest features (cosine).

    Soft labels of patches are interpolated bilinearly to the mask's pixels, and each pixel gets the class with the
    largest value. Patches of the same photo are excluded if it is in both splits.

    Raises:
        PlanError: if an option is out of range.
        EvaluationError: if the memory has fewer patches than ``k``, or features are not finite.
    """
    options.validate()
    see_all: See = functools.partial(see, cache=cache, progress=progress)
    memory = _memory(source, data.train, options, see_all)
    found = []
    shown = whole_images(data.val.images, options.size, source)
    for (image, crop), features in zip(shown, see_all(source, shown), strict=True):
        others = memory.others(image.digest)
        _require("memory", int(others.sum()), options.k)
        queries = features.flatten(0, 1).to(memory.features)  # (h, w, C) -> (h w, C)
        labels = memory.retrieve(queries, options.k, options.temperature, ~others).unflatten(0, features.shape[:2])
        pixels = at_places(labels.cpu(), *crop.places(image.height, image.width), *source.patch)
        found.append(count(pixels.argmax(-1), image.labels(), image.classes))
    return Counts.joined(found)


def _memory(source: FeatureSource, train: LabelledSet, options: HummingbirdOptions, see_all: See) -> Memory:
    shown = whole_images(train.images, options.size, source)
    generator = torch.Generator().manual_seed(options.seed)
    features, labels, photos = [], [], []
    numbers: dict[str, int] = {}
    for number, ((image, crop), seen) in enumerate(zip(shown, see_all(source, shown), strict=True)):
        counts = patch_counts(image.labels(), crop, image.classes, *source.patch)[..., :-1]
        counts = counts.flatten(0, 1)  # (h, w, K) -> (h w, K)
        chosen = drawn(counts, quota(options.memory, number, len(shown)), generator)
        features.append(F.normalize(seen.flatten(0, 1)[chosen], dim=-1))
        shares = counts[chosen].float()
        labels.append(shares / shares.sum(-1, keepdim=True))
        photos.append(torch.full((len(chosen),), numbers.setdefault(image.digest, number)))
    bank, shares, owners = (torch.cat(parts).to(source.device) for parts in (features, labels, photos))
    _require("memory", len(bank), options.k)
    return Memory(bank, shares, owners, numbers)


def drawn(counts: Tensor, most: int | None, generator: torch.Generator) -> Tensor:
    """Indices of the patches of one image to keep: rare classes first, ties in random order.

    As in open-hummingbird-eval: each patch gets a uniform random number times the sum, over its classes, of the number
    of patches of the image with that class; the patches with the smallest products are kept. ``counts`` (P, K) are the
    pixels of each class in each patch; patches without labelled pixels are never kept.
    """
    there = torch.nonzero(counts.sum(-1)).flatten()
    shows = counts[there] > 0
    commonness = (shows * shows.sum(0)).sum(-1)
    order = (commonness * torch.rand(len(there), generator=generator)).argsort(stable=True)
    return there[order[:most].sort().values]
