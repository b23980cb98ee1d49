"""Label propagation by the similarity of patches, as published for DINO, and the evaluation of DAVIS.

Caron et al., ICCV 2021, section 4.2.2, after Jabri et al., NeurIPS 2020: nothing is trained. Each patch takes its
labels from the most similar patches near its position in the first frame and in the last few frames. Masks are scored
by J and F (Perazzi et al., CVPR 2016; Pont-Tuset et al. 2017).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.evaluation.correspondence.davis import ClipData, Frame
from denoising_vit.evaluation.features import FeatureCache, see
from denoising_vit.evaluation.masks import NO_LABEL
from denoising_vit.evaluation.options import PropagationOptions
from denoising_vit.evaluation.outcomes import Measured
from denoising_vit.evaluation.patches import at_places, shown_size, whole_images
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.evaluation.workbench import Line, Workbench
from denoising_vit.views.crops import Crop
from denoising_vit.views.patch_grid import patch_centres

#: Distance within which contours match, as a fraction of the image's diagonal.
BOUND = 0.008


@dataclass(frozen=True, eq=False)
class Propagated(Measured):
    """J&F, J and F of each object in percent, grouped by sequence.

    As in the semi-supervised evaluation of DAVIS 2017, scores are means over the frames of an object, without the first
    (given) and the last, then over the objects of all sequences. Differences: the last frame counts if there is no
    other, unlabelled pixels are ignored (DAVIS: background), and numbers missing from the first mask are not objects
    (DAVIS: all up to the largest).
    """

    METRICS: ClassVar[tuple[str, ...]] = ("J&F", "J", "F")


def propagation(bench: Workbench, names: Sequence[str], options: PropagationOptions) -> Iterator[Line]:
    """Evaluate label propagation on each source, with the first as the reference."""
    options.validate()
    data = bench.data_of(ClipData, "videos with masks of objects (DAVIS)")
    found = {"outcome": Propagated, "over": "sequences"}
    yield from bench.compare(names, bench.untrained("propagation", propagate, data, options, items="frames", **found))


def propagate(
    source: FeatureSource,
    data: ClipData,
    options: PropagationOptions,
    *,
    cache: FeatureCache | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Propagated:
    """Propagate the first mask of each video and compare the result with the other masks."""
    options.validate()
    values, groups = [], []
    features = see(source, whole_images(data.val.images, options.size, source), cache, progress)
    for number, frames in enumerate(data.clips):
        found = _follow(source, frames, features, options)
        values.append(found)
        groups += [number] * len(found)
    return Propagated(np.concatenate(values), np.array(groups, dtype=np.int64))


def _follow(
    source: FeatureSource, frames: Sequence[Frame], features: Iterator[Tensor], options: PropagationOptions
) -> np.ndarray:
    """J&F, J and F of the objects of one sequence, (objects, 3) in percent; consumes the features of its frames."""
    first = frames[0]
    grid = shown_size(options.size, first, source), *source.patch
    start = at_patches(first.labels(), first.objects, *grid).to(source.device)
    evaluated = evaluated_frames(frames)
    sequence = (next(features).to(source.device) for _ in frames)
    figures = []
    for number, labels in enumerate(carry(sequence, start, options), start=1):
        if number in evaluated:
            mask = to_mask(labels, first.height, first.width, *grid)
            figures.append(compared(frames[number].labels().numpy(), mask.cpu().numpy(), first.objects))
    return np.mean(figures, axis=0)


def evaluated_frames(frames: Sequence[Frame]) -> frozenset[int]:
    """Frames with a mask, except the first and the last; the last counts if there is no other."""
    there = [number for number, frame in enumerate(frames) if number and frame.mask is not None]
    return frozenset([number for number in there if number < len(frames) - 1] or there)


# --- labels of patches ---


class Held(NamedTuple):
    """One frame of the context: normalised features (h, w, C), and label weights (h, w, K) in [0, 1]."""

    features: Tensor
    labels: Tensor


def carry(features: Iterable[Tensor], first: Tensor, options: PropagationOptions) -> Iterator[Tensor]:
    """Propagate the labels (h, w, K) of the first frame through the features (h, w, C) of all frames of a video.

    Only the context is in memory. Labels are propagated as computed, not rescaled to [0, 1]. Yields the labels of each
    frame after the first.
    """
    recent: deque[Held] = deque(maxlen=options.context)
    anchor: Held | None = None
    for frame in features:
        target = F.normalize(frame, dim=-1)
        if anchor is None:
            anchor = Held(target, first)
            continue
        labels = carried(target, [anchor, *recent], k=options.k, radius=options.radius, temperature=options.temperature)
        recent.append(Held(target, labels))
        yield labels


def carried(target: Tensor, context: Sequence[Held], *, k: int, radius: int, temperature: float) -> Tensor:
    """Labels (h, w, K) of a frame: for each patch, the weighted mean over the most similar patches of the context.

    Computed row by row to limit memory.

    Args:
        target: normalised features (h, w, C).
        context: frames of the same grid, at least one.
        k: number of voting patches over all frames; ties with the last of them vote too.
        radius: maximum distance in rows and columns; 0 for no limit.
        temperature: weights are exp(cosine / temperature).
    """
    h, w, channels = target.shape
    # Rows first, so that the rows around a patch are contiguous: (h, n, w, ...).
    features, labels = (torch.stack(parts, dim=1) for parts in zip(*context, strict=True))
    columns = torch.arange(w, device=target.device)
    far = (columns[:, None] - columns).abs() > (radius or w)  # (w, w)
    found = []
    for row in range(h):
        near = slice(max(row - radius, 0), row + radius + 1) if radius else slice(None)
        around = features[near].reshape(-1, channels)  # (rows n w, C)
        similar = (target[row] @ around.T).view(w, -1, w).masked_fill(far[:, None], -torch.inf).flatten(1)
        best = similar.topk(min(k, similar.shape[1])).values
        # Subtracting the maximum leaves the weights unchanged and keeps them finite at any temperature.
        weights = ((similar - best[:, :1]) / temperature).masked_fill(similar < best[:, -1:], -torch.inf).softmax(-1)
        found.append(weights @ labels[near].reshape(len(around), -1))
    return torch.stack(found)


def at_patches(labels: Tensor, objects: Sequence[int], size: tuple[int, int], patch_size: int, stride: int) -> Tensor:
    """Labels of patches, (h, w, 1 + objects) float32 of 0 and 1; each patch has the label of the pixel at its centre.

    Pixel values are object numbers, 0 for the background (the first channel), or negative for no label (all 0).
    ``size`` is the input's size in pixels.
    """
    rows, columns = (
        torch.from_numpy((patch_centres(side, patch_size, stride) * pixels).astype(np.int64))
        for side, pixels in zip(size, labels.shape, strict=True)
    )
    middle = labels[rows][:, columns]
    return (middle[..., None] == torch.tensor([0, *objects])).float()


def to_mask(labels: Tensor, height: int, width: int, size: tuple[int, int], patch_size: int, stride: int) -> Tensor:
    """Strongest label of each pixel of a frame, (H, W) int64, from labels (h, w, K) of patches of an input of ``size``.

    Labels are interpolated bilinearly, then each is rescaled to [0, 1], as published.
    """
    rows, columns = Crop.whole(size).places(height, width)
    return filled(at_places(labels, rows, columns, patch_size, stride)).argmax(-1)


def filled(labels: Tensor) -> Tensor:
    """Rescale each label of (H, W, K) to [0, 1]; constant labels stay as they are."""
    low, high = labels.amin((0, 1)), labels.amax((0, 1))
    return torch.where(high > low, (labels - low) / (high - low).clamp(min=torch.finfo(labels.dtype).tiny), labels)


# --- J and F ---


def compared(truth: np.ndarray, found: np.ndarray, objects: Sequence[int]) -> np.ndarray:
    """J&F, J and F of each object in one frame, (objects, 3) in percent.

    ``truth`` (H, W) has object numbers, 0 elsewhere, and NO_LABEL for ignored pixels; ``found`` (H, W) has 1 for the
    first object and so on.
    """
    void = truth == NO_LABEL
    figures = []
    for place, number in enumerate(objects, start=1):
        masks = truth == number, found == place
        j, f = region_similarity(*masks, void), contour_accuracy(*masks, void)
        figures.append((100 * (j + f) / 2, 100 * j, 100 * f))
    return np.array(figures)


def region_similarity(truth: np.ndarray, found: np.ndarray, void: np.ndarray | None = None) -> float:
    """J, the intersection over union in [0, 1] of two masks (H, W) outside ``void``; 1 for two empty masks."""
    truth, found = _without(truth, void), _without(found, void)
    union = int((truth | found).sum())
    return int((truth & found).sum()) / union if union else 1.0


def contour_accuracy(
    truth: np.ndarray, found: np.ndarray, void: np.ndarray | None = None, *, bound: float = BOUND
) -> float:
    """F, the harmonic mean of contour precision and recall, in [0, 1], of masks (H, W).

    A contour pixel matches within a Euclidean distance of ``bound`` times the image's diagonal, rounded up to whole
    pixels. F is 0 if one mask has no contour, 1 if both have none. Pixels of ``void`` are outside both masks.
    """
    ours, theirs = boundary(_without(found, void)), boundary(_without(truth, void))
    count, wanted = int(ours.sum()), int(theirs.sum())
    if not count or not wanted:
        return float(count == wanted)
    radius = math.ceil(bound * math.hypot(*truth.shape))
    precision, recall = _near(ours, theirs, radius) / count, _near(theirs, ours, radius) / wanted
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Contour (H, W), one pixel wide: pixels that differ from the pixel to the right, below, or below right.

    The image border is not a contour.
    """
    beyond = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, across = beyond[:-1, 1:], beyond[1:, :-1], beyond[1:, 1:]
    return (mask != right) | (mask != below) | (mask != across)


def _without(mask: np.ndarray, void: np.ndarray | None) -> np.ndarray:
    return mask if void is None else mask & ~void


def _near(contour: np.ndarray, other: np.ndarray, radius: int) -> int:
    """Number of pixels of a contour within a radius of another one: a dilation evaluated at these pixels only."""
    height, width = other.shape
    before = np.zeros((height, width + 1), dtype=np.int32)  # [y, x]: number of pixels in row y left of x
    np.cumsum(other, axis=1, out=before[:, 1:])
    rows, columns = np.nonzero(contour)
    near = np.zeros(len(rows), dtype=bool)
    for down in range(-radius, radius + 1):
        across = math.isqrt(radius**2 - down**2)
        row, inside = np.clip(rows + down, 0, height - 1), (rows + down >= 0) & (rows + down < height)
        left, right = np.clip(columns - across, 0, width), np.clip(columns + across + 1, 0, width)
        near |= inside & (before[row, right] > before[row, left])
    return int(near.sum())
