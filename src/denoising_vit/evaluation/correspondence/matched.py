"""Keypoint matching of one source of features: every keypoint of every pair looked for in the other photo."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from denoising_vit.evaluation.correspondence.keypoints import apart, at_points, best_places, from_shown, to_shown
from denoising_vit.evaluation.correspondence.options import MatchingOptions
from denoising_vit.evaluation.correspondence.pair import KeypointPair, Point
from denoising_vit.evaluation.correspondence.pairs import PairData, PairedPhoto
from denoising_vit.evaluation.features import FeatureCache, see, shown_size
from denoising_vit.evaluation.outcomes import Measured
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.views.crops import Crop

#: Features (C,) of keypoints by the photo's id and the point.
_Described = Mapping[tuple[str, Point], Tensor]


@dataclass(frozen=True, eq=False)
class Matched(Measured):
    """Percent of each pair's keypoints that were found, and how many keypoints it has; each pair is drawn alone.

    PCK is the mean over pairs of the share of each ("per image"), so that pairs with many keypoints count no more than
    others; differences are of it. PCK per point is the share of all keypoints.
    """

    METRICS: ClassVar[tuple[str, ...]] = ("PCK", "keypoints")

    @classmethod
    def within(cls, errors: Sequence[np.ndarray], alpha: float) -> Matched:
        """Of pairs of which each keypoint's error (n,) is known, as a share of the object's larger side."""
        values = [[100 * np.mean(one <= alpha), len(one)] for one in errors]
        return cls(np.array(values), np.arange(len(values)))

    def scored(self) -> dict[str, float]:
        """PCK per image and per point."""
        share, keypoints = self.values.T
        return {"PCK": super().scored()["PCK"], "PCK per point": float(share @ keypoints / keypoints.sum())}


def match(
    source: FeatureSource,
    data: PairData,
    options: MatchingOptions,
    *,
    cache: FeatureCache | None = None,
    progress: Callable[[], None] = lambda: None,
) -> list[np.ndarray]:
    """Looks for each keypoint of a pair's source at the place of its target with the most similar feature (cosine).

    Photos that are sources are seen first, and only the features of keypoints kept; then those that are targets, one
    by one. Photos are in many pairs: none is seen more than twice.

    Args:
        source: of the features.
        data: the pairs.
        options: how.
        cache: where features are kept.
        progress: called after each photo, :func:`looks` times in all.

    Returns:
        The error (n,) of each keypoint, as a share of the larger side of the target's box, of each pair in their order.

    Raises:
        PlanError: if an option is out of range.
        SizeError: if the size does not fit the patch grid.
        EvaluationError: if features are not finite.
        PhotoError: if a photo cannot be read any more.
    """
    options.validate()
    described: dict[tuple[str, Point], Tensor] = {}
    by_source, by_target = _grouped(data)
    grid = source.patch_size, source.stride

    def seen(ids: Mapping[str, object]) -> Sequence[tuple[PairedPhoto, Crop]]:
        chosen = [photo for photo in data.val.images if photo.id in ids]
        return [(photo, Crop.whole(shown_size(options.size, photo, source))) for photo in chosen]

    shown = seen(by_source)
    for (photo, crop), features in zip(shown, see(source, shown, cache, progress), strict=True):
        points = list(dict.fromkeys(point for _, pair in by_source[photo.id] for point in pair.source_points))
        places = to_shown(points, photo.height, photo.width, crop.size)
        found = at_points(features.to(source.device), places, *grid)
        described.update(((photo.id, point), feature) for point, feature in zip(points, found, strict=True))

    errors: list[np.ndarray] = [np.empty(0)] * len(data.pairs)
    shown = seen(by_target)
    for (photo, crop), features in zip(shown, see(source, shown, cache, progress), strict=True):
        queries = _queries(described, [pair for _, pair in by_target[photo.id]])
        places = best_places(queries, features.to(source.device), *grid, options.upsample)
        found = from_shown(places, photo.height, photo.width, crop.size)
        taken = 0
        for number, pair in by_target[photo.id]:
            truth = np.array(pair.target_points)
            errors[number] = apart(found[taken : taken + len(truth)], truth) / pair.side
            taken += len(truth)
    return errors


def looks(data: PairData) -> int:
    """How many photos :func:`match` sees, those twice that are both sources and targets."""
    return sum(map(len, _grouped(data)))


_Grouped = dict[str, list[tuple[int, KeypointPair]]]


def _grouped(data: PairData) -> tuple[_Grouped, _Grouped]:
    """Pairs and their numbers by the ids of their sources, and of their targets."""
    sources: _Grouped = defaultdict(list)
    targets: _Grouped = defaultdict(list)
    for number, pair in enumerate(data.pairs):
        sources[pair.source].append((number, pair))
        targets[pair.target].append((number, pair))
    return sources, targets


def _queries(described: _Described, pairs: Sequence[KeypointPair]) -> Tensor:
    """Features (n, C) of the source keypoints of several pairs, one after the other."""
    return torch.stack([described[pair.source, point] for pair in pairs for point in pair.source_points])
