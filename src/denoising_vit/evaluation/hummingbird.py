"""Dense nearest-neighbour retrieval ("Hummingbird", Balazevic et al. 2023), as open-hummingbird-eval measures it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.features import FeatureCache, Patches, see, shown_size
from denoising_vit.evaluation.labelled import LabelledData, LabelledImage, LabelledSet
from denoising_vit.evaluation.options import (
    HummingbirdOptions,
)
from denoising_vit.evaluation.patches import at_places, nearest, patch_counts
from denoising_vit.evaluation.scores import Counts, count
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.evaluation.workbench import Line, Workbench
from denoising_vit.views.crops import Crop


@dataclass(frozen=True, eq=False)
class Memory:
    """Patches of training images.

    Attributes:
        features: (N, C), normalised.
        labels: (N, K), the share of each class among a patch's labelled pixels.
        photos: (N,), which photo each is from.
        numbers: of photos, by their digests; copies of a photo have one number.
    """

    features: Tensor
    labels: Tensor
    photos: Tensor
    numbers: Mapping[str, int]

    def others(self, digest: str) -> Tensor:
        """(N,) bool: which patches are from other photos than this one."""
        return self.photos != self.numbers.get(digest, -1)

    def retrieve(self, queries: Tensor, k: int, temperature: float, without: Tensor | None = None) -> Tensor:
        """Soft labels (Q, K) of features (Q, C): means of those of the k nearest, weighted by softmax(cosine / T)."""
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
    """Labels each pixel of the images of ``val`` by the patches of ``train`` whose features are nearest (cosine).

    Soft labels of patches are brought to the mask's pixels bilinearly; then the largest counts. An image's own patches
    are never looked at, should it be in both splits.

    Args:
        source: of the features.
        data: the labelled images.
        options: how.
        cache: where features are kept.
        progress: called after each image.

    Returns:
        Counts over labelled pixels, image by image.

    Raises:
        PlanError: if an option is out of range.
        EvaluationError: if the memory has fewer patches than neighbours are asked for, or features are not finite.
    """
    options.validate()
    memory = _memory(source, data.train, options, cache, progress)
    found = []
    shown = _shown(data.val, source, options)
    for (image, crop), features in zip(shown, see(source, shown, cache, progress), strict=True):
        others = memory.others(image.digest)
        _require(int(others.sum()), options.k)
        queries = features.flatten(0, 1).to(memory.features)  # (h, w, C) -> (h w, C)
        labels = memory.retrieve(queries, options.k, options.temperature, ~others).unflatten(0, features.shape[:2])
        pixels = at_places(labels.cpu(), *crop.places(image.height, image.width), source.patch_size, source.stride)
        found.append(count(pixels.argmax(-1), image.labels(), image.classes))
    return Counts.joined(found)


def hummingbird(bench: Workbench, names: Sequence[str], options: HummingbirdOptions) -> Iterator[Line]:
    """Retrieval by the features of each source, the first one being what others are held against.

    Raises:
        PlanError: if an option is out of range.
        SizeError: if the size does not fit the patch grid.
        EvaluationError: if the data have no classes, or a name is unknown.
    """
    options.validate()
    data = bench.labelled
    yield from bench.measure(
        names,
        lambda source, advance: retrieved(source, data, options, cache=bench.cache, progress=advance),
        options,
        task="hummingbird",
        looks="images",
        count=len(data.train.images) + len(data.val.images),
    )


def _memory(
    source: FeatureSource,
    train: LabelledSet,
    options: HummingbirdOptions,
    cache: FeatureCache | None,
    progress: Callable[[], None],
) -> Memory:
    shown = _shown(train, source, options)
    generator = torch.Generator().manual_seed(options.seed)
    features, labels, photos = [], [], []
    numbers: dict[str, int] = {}
    for number, ((image, crop), seen) in enumerate(zip(shown, see(source, shown, cache, progress), strict=True)):
        counts = patch_counts(image.labels(), crop, image.classes, source.patch_size, source.stride)[..., :-1]
        until, start = (options.memory * n // len(shown) for n in (number + 1, number))
        chosen = drawn(counts.flatten(0, 1), until - start if options.memory else None, generator)
        features.append(F.normalize(seen.flatten(0, 1)[chosen], dim=-1))
        shares = counts.flatten(0, 1)[chosen].float()
        labels.append(shares / shares.sum(-1, keepdim=True))
        photos.append(torch.full((len(chosen),), numbers.setdefault(image.digest, number)))
    bank, shares, owners = (torch.cat(parts).to(source.device) for parts in (features, labels, photos))
    _require(len(bank), options.k)
    return Memory(bank, shares, owners, numbers)


def drawn(counts: Tensor, most: int | None, generator: torch.Generator) -> Tensor:
    """Indices of the patches of one image that are kept: rare classes first, by chance among alike ones.

    As in open-hummingbird-eval: each patch has a uniform number times the sum, over its classes, of how many patches of
    the image show that class; those with the least are kept.

    Args:
        counts: (P, K) pixels of each class; patches without any are never kept.
        most: how many are kept at most; None for all.
        generator: of the draw.
    """
    there = torch.nonzero(counts.sum(-1)).flatten()
    shows = counts[there] > 0
    commonness = (shows * shows.sum(0)).sum(-1)
    order = (commonness * torch.rand(len(there), generator=generator)).argsort(stable=True)
    return there[order[:most].sort().values]


def _shown(images: LabelledSet, patches: Patches, options: HummingbirdOptions) -> list[tuple[LabelledImage, Crop]]:
    return [(image, Crop.whole(shown_size(options.size, image, patches))) for image in images.images]


def _require(patches: int, k: int) -> None:
    if patches < k:
        raise EvaluationError(
            f"a memory of {patches} labelled patches of other images is less than the {k} neighbours that labels are "
            "taken from; give more images, larger ones (--size), a larger --memory or a smaller --k"
        )
