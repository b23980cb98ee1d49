"""Dense nearest-neighbour retrieval ("Hummingbird", Balazevic et al. 2023), as in open-hummingbird-eval."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.features import FeatureCache, See, see, whole_images
from denoising_vit.evaluation.labelled import LabelledData, LabelledSet
from denoising_vit.evaluation.options import HummingbirdOptions
from denoising_vit.evaluation.patches import at_places, nearest, patch_counts, quota
from denoising_vit.evaluation.scores import Counts, count
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.evaluation.workbench import Line, Workbench


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
        _require(int(others.sum()), options.k)
        queries = features.flatten(0, 1).to(memory.features)  # (h, w, C) -> (h w, C)
        labels = memory.retrieve(queries, options.k, options.temperature, ~others).unflatten(0, features.shape[:2])
        pixels = at_places(labels.cpu(), *crop.places(image.height, image.width), source.patch_size, source.stride)
        found.append(count(pixels.argmax(-1), image.labels(), image.classes))
    return Counts.joined(found)


def _memory(source: FeatureSource, train: LabelledSet, options: HummingbirdOptions, see_all: See) -> Memory:
    shown = whole_images(train.images, options.size, source)
    generator = torch.Generator().manual_seed(options.seed)
    features, labels, photos = [], [], []
    numbers: dict[str, int] = {}
    for number, ((image, crop), seen) in enumerate(zip(shown, see_all(source, shown), strict=True)):
        counts = patch_counts(image.labels(), crop, image.classes, source.patch_size, source.stride)[..., :-1]
        counts = counts.flatten(0, 1)  # (h, w, K) -> (h w, K)
        chosen = drawn(counts, quota(options.memory, number, len(shown)), generator)
        features.append(F.normalize(seen.flatten(0, 1)[chosen], dim=-1))
        shares = counts[chosen].float()
        labels.append(shares / shares.sum(-1, keepdim=True))
        photos.append(torch.full((len(chosen),), numbers.setdefault(image.digest, number)))
    bank, shares, owners = (torch.cat(parts).to(source.device) for parts in (features, labels, photos))
    _require(len(bank), options.k)
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


def _require(patches: int, k: int) -> None:
    if patches < k:
        raise EvaluationError(
            f"the memory has {patches} labelled patches of other images, fewer than the {k} neighbours; "
            "give more images, larger images (--size), a larger --memory or a smaller --k"
        )
