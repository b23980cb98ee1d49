"""K-means clustering of patches: how well unsupervised clusters match semantic classes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.features import FeatureCache, see
from denoising_vit.evaluation.labelled import LabelledData
from denoising_vit.evaluation.options import ClusteringOptions
from denoising_vit.evaluation.outcomes import Curve
from denoising_vit.evaluation.patches import patch_counts, quota, whole_images
from denoising_vit.evaluation.scores import Counts
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.evaluation.workbench import Line, Task, Workbench

#: How clusters are mapped to classes: each to its most frequent class, or one cluster per class.
Matching = Literal["majority", "hungarian"]


def clustering(bench: Workbench, names: Sequence[str], options: ClusteringOptions) -> Iterator[Line]:
    """Evaluate clustering on each source; one line per number of clusters and mapping to classes."""
    options.validate()
    for clusters in options.clusters:
        yield from _compared(bench, names, options, clusters)


def _compared(bench: Workbench, names: Sequence[str], options: ClusteringOptions, clusters: int) -> Iterator[Line]:
    """Lines for one number of clusters; every mapping to classes uses the same clusters."""
    data = bench.labelled
    tables: dict[tuple[str, int], np.ndarray] = {}  # by source and seed

    def tables_of(source: FeatureSource, seed: int) -> np.ndarray:
        key = source.name, seed
        if key not in tables:
            with bench.images_of(source, f"images, {clusters} clusters", 2 * len(data.val.images)) as step:
                tables[key] = clustered(source, data, options, clusters, seed, cache=bench.cache, progress=step)
        return tables[key]

    def evaluate(
        source: FeatureSource, seeds: tuple[int, ...], matching: Matching
    ) -> Iterator[tuple[int, Counts, Curve]]:
        for seed in seeds:
            yield seed, matched(tables_of(source, seed), matching), []

    ways: list[Matching] = ["majority", "hungarian"] if clusters == len(data.val.class_names) else ["majority"]
    for matching in ways:
        settings: dict[str, Any] = asdict(options) | {"clusters": clusters, "matching": matching}
        scored = functools.partial(evaluate, matching=matching)
        yield from bench.compare(names, Task("clustering", scored, settings, options.seeds, options.size))


def clustered(
    source: FeatureSource,
    data: LabelledData,
    options: ClusteringOptions,
    clusters: int,
    seed: int,
    *,
    cache: FeatureCache | None = None,
    progress: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Cluster the patches of ``val`` by k-means and count the pixels of each class: (images, k, K) int32.

    Each pixel belongs to the cluster of the patch with the nearest centre. ``progress`` is called twice per image.
    There must be at least as many patches as clusters.
    """
    options.validate()
    shown = whole_images(data.val.images, options.size, source)
    generator = torch.Generator().manual_seed(seed)
    some = []
    for number, features in enumerate(see(source, shown, cache, progress)):
        chosen = torch.randperm(features[..., 0].numel(), generator=generator)
        some.append(features.flatten(0, 1)[chosen[: quota(options.patches, number, len(shown))]])
    model = _fitted(torch.cat(some), clusters, seed)
    tables = []
    for (image, crop), features in zip(shown, see(source, shown, cache, progress), strict=True):
        found = torch.from_numpy(model.predict(features.flatten(0, 1).numpy())).long()
        pixels = patch_counts(image.labels(), crop, image.classes, *source.patch)[..., :-1]
        table = torch.zeros(clusters, image.classes, dtype=torch.int64).index_add_(0, found, pixels.flatten(0, 1))
        tables.append(table.int().numpy())
    return np.stack(tables)


def matched(tables: np.ndarray, matching: Matching) -> Counts:
    """Map each cluster to a class, using all images together, and count hits per image.

    Args:
        tables: (images, k, K) pixels of each cluster and class.
        matching: majority: the most frequent class among the cluster's pixels. hungarian: one cluster per class, with
            the largest sum of IoU; needs k = K.

    Raises:
        EvaluationError: for hungarian, if the numbers of clusters and classes differ.
    """
    total = tables.sum(0, dtype=np.int64)  # (k, K)
    if matching == "majority":
        classes = total.argmax(1)
    else:
        if total.shape[0] != total.shape[1]:
            raise EvaluationError(f"expected as many clusters as classes, got {total.shape[0]} and {total.shape[1]}")
        from scipy.optimize import linear_sum_assignment  # not needed by most commands

        union = total.sum(0) + total.sum(1, keepdims=True) - total
        classes = linear_sum_assignment(total / np.maximum(union, 1), maximize=True)[1]
    chosen = np.eye(total.shape[1], dtype=np.int64)[classes]  # (k, K)
    hits = np.einsum("ikc,kc->ic", tables, chosen)
    return Counts(hits, tables.sum(1, dtype=np.int64), tables.sum(2, dtype=np.int64) @ chosen)


def _fitted(points: Tensor, clusters: int, seed: int) -> Any:
    """Fit k-means to points (N, C)."""
    from sklearn.cluster import KMeans  # takes seconds to import
    from sklearn.exceptions import ConvergenceWarning

    if len(points) < clusters:
        raise EvaluationError(
            f"{len(points)} patches are fewer than {clusters} clusters; give more images, larger images (--size), more "
            "--patches or fewer --clusters"
        )
    runs: Any = 1  # scikit-learn has no type annotations
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct features than clusters
        return KMeans(clusters, n_init=runs, random_state=seed).fit(points.numpy())
