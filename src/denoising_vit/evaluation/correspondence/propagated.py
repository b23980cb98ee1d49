"""Label propagation of one source of features: every object of every video followed, and judged frame by frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from denoising_vit.evaluation.correspondence.clips import ClipData, Frame
from denoising_vit.evaluation.correspondence.options import PropagationOptions
from denoising_vit.evaluation.correspondence.propagation import at_patches, carry, to_mask
from denoising_vit.evaluation.correspondence.similarity import contour_accuracy, region_similarity
from denoising_vit.evaluation.features import FeatureCache, see, shown_size
from denoising_vit.evaluation.masks import NO_LABEL
from denoising_vit.evaluation.outcomes import Measured
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.views.crops import Crop


@dataclass(frozen=True, eq=False)
class Propagated(Measured):
    """How well each object was followed, in percent; objects of one sequence belong together.

    As in the evaluation of DAVIS 2017 for given first masks, figures are means over the frames of an object, without
    the first one, which is given, and the last one; then over all objects, those of all sequences alike. Other than
    there, the last frame counts where no other would, pixels without a label count for nothing (there they are
    background), and a number that the first mask does not have is no object (there all up to the largest are).
    """

    METRICS: ClassVar[tuple[str, ...]] = ("J&F", "J", "F")


def propagate(
    source: FeatureSource,
    data: ClipData,
    options: PropagationOptions,
    *,
    cache: FeatureCache | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Propagated:
    """Carries the first mask of each video through it, and compares with the masks that are there.

    Args:
        source: of the features.
        data: the videos.
        options: how.
        cache: where features are kept.
        progress: called after each frame.

    Returns:
        J&F, J and F of each object of each sequence, in their order.

    Raises:
        PlanError: if an option is out of range.
        SizeError: if the size does not fit the patch grid.
        EvaluationError: if features are not finite, or a mask cannot be read any more.
        PhotoError: if a frame cannot be read any more.
    """
    options.validate()
    values, groups = [], []
    shown = [(frame, Crop.whole(shown_size(options.size, frame, source))) for frame in data.val.images]
    features = see(source, shown, cache, progress)
    for number, frames in enumerate(data.clips):
        found = _follow(source, frames, features, options)
        values.append(found)
        groups += [number] * len(found)
    return Propagated(np.concatenate(values), np.array(groups, dtype=np.int64))


def _follow(
    source: FeatureSource, frames: Sequence[Frame], features: Iterator[Tensor], options: PropagationOptions
) -> np.ndarray:
    """J&F, J and F of the objects of one sequence, (objects, 3) in percent; takes as many features as it has frames."""
    first = frames[0]
    grid = shown_size(options.size, first, source), source.patch_size, source.stride
    start = at_patches(first.labels(), first.objects, *grid).to(source.device)
    judged = judged_frames(frames)
    seen = (next(features).to(source.device) for _ in frames)
    figures = []
    for number, labels in enumerate(carry(seen, start, options), start=1):
        if number in judged:
            mask = to_mask(labels, first.height, first.width, *grid)
            figures.append(compared(frames[number].labels().numpy(), mask.cpu().numpy(), first.objects))
    return np.mean(figures, axis=0)


def judged_frames(frames: Sequence[Frame]) -> frozenset[int]:
    """Which frames count: those with a mask but the first and the last; the last as well where no other would."""
    there = [number for number, frame in enumerate(frames) if number and frame.mask is not None]
    return frozenset([number for number in there if number < len(frames) - 1] or there)


def compared(truth: np.ndarray, found: np.ndarray, objects: Sequence[int]) -> np.ndarray:
    """J&F, J and F of each object in one frame, (objects, 3) in percent.

    Args:
        truth: (H, W) numbers of objects, 0 for all else, NO_LABEL where nothing counts.
        found: (H, W), 1 for the first object and so on, 0 for all else.
        objects: the numbers.
    """
    void = truth == NO_LABEL
    figures = []
    for place, number in enumerate(objects, start=1):
        masks = truth == number, found == place
        j, f = region_similarity(*masks, void), contour_accuracy(*masks, void)
        figures.append((100 * (j + f) / 2, 100 * j, 100 * f))
    return np.array(figures)
