"""Keypoint matching: locate the keypoints of one photo in another by feature similarity alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.evaluation.correspondence.pairs import KeypointPair, PairData, PairedPhoto, Point
from denoising_vit.evaluation.features import FeatureCache, see
from denoising_vit.evaluation.options import MatchingOptions
from denoising_vit.evaluation.outcomes import Measured
from denoising_vit.evaluation.patches import at_places, at_points, whole_images
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.evaluation.workbench import Line, Workbench
from denoising_vit.views.crops import Crop

#: Maximum number of interpolated feature values in memory.
_AT_ONCE = 2**24


@dataclass(frozen=True, eq=False)
class Matched(Measured):
    """Percent of correct keypoints of each pair, and its number of keypoints; every pair is a group.

    PCK is the mean over pairs ("per image"), so that every pair has the same weight; intervals are for this metric. PCK
    per point is the percentage over all keypoints.
    """

    METRICS: ClassVar[tuple[str, ...]] = ("PCK", "keypoints")

    @classmethod
    def within(cls, errors: Sequence[np.ndarray], alpha: float) -> Matched:
        """Compute from the errors (n,) of each pair's keypoints, as a fraction of the object's larger side."""
        values = [[100 * np.mean(one <= alpha), len(one)] for one in errors]
        return cls(np.array(values), np.arange(len(values)))

    def scored(self) -> dict[str, float]:
        """PCK per image and per point."""
        share, keypoints = self.values.T
        return {"PCK": super().scored()["PCK"], "PCK per point": float(share @ keypoints / keypoints.sum())}


def matching(bench: Workbench, names: Sequence[str], options: MatchingOptions) -> Iterator[Line]:
    """Evaluate keypoint matching on each source, with the first as the reference; one line per alpha."""
    options.validate()
    data = bench.data_of(PairData, "pairs of photos with keypoints")
    errors: dict[str, list[np.ndarray]] = {}  # by source, the same for each alpha

    def score(source: FeatureSource, data: PairData, options: MatchingOptions, **reading: Any) -> Matched:
        if source.name not in errors:
            errors[source.name] = match(source, data, options, **reading)
        return Matched.within(errors[source.name], *options.alpha)

    counted = {"items": "photos", "count": forward_passes(data)}
    for alpha in options.alpha:
        one = replace(options, alpha=(alpha,))
        task = bench.untrained("matching", score, data, one, **counted, outcome=Matched, over="pairs")
        yield from bench.compare(names, task)


def match(
    source: FeatureSource,
    data: PairData,
    options: MatchingOptions,
    *,
    cache: FeatureCache | None = None,
    progress: Callable[[], None] = lambda: None,
) -> list[np.ndarray]:
    """Match each keypoint of a source photo to the position of the most similar feature (cosine) in the target photo.

    Forward passes run over the source photos first, keeping only the features at keypoints, then over the targets one
    by one, so each photo needs at most two. ``progress`` is called after each pass: :func:`forward_passes` times in
    total.

    Returns:
        For each pair, the errors (n,) of its keypoints as a fraction of the larger side of the target's box.
    """
    options.validate()
    described: dict[tuple[str, Point], Tensor] = {}
    by_source, by_target = _grouped(data)

    def shown_of(ids: Mapping[str, object]) -> Sequence[tuple[PairedPhoto, Crop]]:
        return whole_images([photo for photo in data.val.images if photo.id in ids], options.size, source)

    shown = shown_of(by_source)
    for (photo, crop), features in zip(shown, see(source, shown, cache, progress), strict=True):
        points = list(dict.fromkeys(point for _, pair in by_source[photo.id] for point in pair.source_points))
        places = to_shown(points, photo.height, photo.width, crop.size)
        found = at_points(features.to(source.device), places, *source.patch)
        described.update(((photo.id, point), feature) for point, feature in zip(points, found, strict=True))

    errors: list[np.ndarray] = [np.empty(0)] * len(data.pairs)
    shown = shown_of(by_target)
    for (photo, crop), features in zip(shown, see(source, shown, cache, progress), strict=True):
        pairs = by_target[photo.id]
        queries = torch.stack([described[pair.source, point] for _, pair in pairs for point in pair.source_points])
        places = best_places(queries, features.to(source.device), *source.patch, options.upsample)
        found = from_shown(places, photo.height, photo.width, crop.size)
        start = 0
        for number, pair in pairs:
            truth = np.array(pair.target_points)
            errors[number] = np.linalg.norm(found[start : start + len(truth)] - truth, axis=-1) / pair.side
            start += len(truth)
    return errors


def forward_passes(data: PairData) -> int:
    """Number of forward passes of :func:`match`: photos, counted twice if they are both source and target."""
    return sum(map(len, _grouped(data)))


_Grouped = dict[str, list[tuple[int, KeypointPair]]]


def _grouped(data: PairData) -> tuple[_Grouped, _Grouped]:
    """Numbered pairs by the ids of their source photos, and by those of their target photos."""
    sources: _Grouped = defaultdict(list)
    targets: _Grouped = defaultdict(list)
    for number, pair in enumerate(data.pairs):
        sources[pair.source].append((number, pair))
        targets[pair.target].append((number, pair))
    return sources, targets


def best_places(queries: Tensor, target: Tensor, patch_size: int, stride: int, upsample: int = 1) -> np.ndarray:
    """Positions of the features most similar (cosine) to queries: (n, 2), row and column in pixels of the input.

    Args:
        queries: features (n, C), of any norm.
        target: features (h, w, C) of the photo.
        patch_size: patch size in pixels of the input.
        stride: distance between patches.
        upsample: factor of bilinear upsampling before the search; with 1, positions are patch centres. Ties go to the
            first position in row-major order.
    """
    h, w, channels = target.shape
    rows, columns = (_places(count, patch_size, stride, upsample) for count in (h, w))
    best = torch.full((len(queries),), -torch.inf, device=queries.device)
    found = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    band = max(_AT_ONCE // (len(columns) * channels), 1)
    for start in range(0, len(rows), band):
        features = at_places(target, rows[start : start + band], columns, patch_size, stride)
        similarity, place = (queries @ F.normalize(features, dim=-1).flatten(0, 1).T).max(-1)
        better = similarity > best
        best = torch.where(better, similarity, best)
        found = torch.where(better, place + start * len(columns), found)
    row, column = np.divmod(found.cpu().numpy(), len(columns))
    return np.stack([rows[row], columns[column]], axis=-1)


def _places(patches: int, patch_size: int, stride: int, upsample: int) -> np.ndarray:
    """Centres of the cells of the upsampled grid along one side, in pixels."""
    return patch_size / 2 + ((np.arange(patches * upsample) + 0.5) / upsample - 0.5) * stride


def to_shown(points: Sequence[Point], height: int, width: int, size: tuple[int, int]) -> np.ndarray:
    """Convert points (x, y) of a photo of height x width pixels to (n, 2), row and column in an input of ``size``."""
    x, y = np.array(points, dtype=np.float64).T
    return np.stack([(y + 0.5) / height * size[0], (x + 0.5) / width * size[1]], axis=-1)


def from_shown(places: np.ndarray, height: int, width: int, size: tuple[int, int]) -> np.ndarray:
    """Inverse of :func:`to_shown`: (n, 2), x and y in pixels of the photo."""
    row, column = places.T
    return np.stack([column / size[1] * width - 0.5, row / size[0] * height - 0.5], axis=-1)
