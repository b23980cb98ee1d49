"""Correspondence evaluation of several sources of features: label propagation and keypoint matching."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.correspondence.davis import DAVIS, ClipData, open_clips
from denoising_vit.evaluation.correspondence.keypoint_matching import Matched, looks, match
from denoising_vit.evaluation.correspondence.label_propagation import Propagated, propagate
from denoising_vit.evaluation.correspondence.options import MatchingOptions, PropagationOptions
from denoising_vit.evaluation.correspondence.pairs import KEYPOINTS, SPAIR, PairData, open_pairs
from denoising_vit.evaluation.layouts import find_layout
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.evaluation.workbench import Line, Workbench


def open_correspondence(
    path: str | Path,
    *,
    sequences: int = 0,
    split: str = "test",
    pairs: int = 0,
    progress: Callable[[], None] | None = None,
) -> ClipData | PairData:
    """Open videos in the layout of DAVIS, pairs in that of SPair-71k, or a folder of keypoints.

    Args:
        path: the folder.
        sequences: maximum number of videos, spread evenly; 0 takes all.
        split: split of SPair-71k: ``trn``, ``val`` or ``test``.
        pairs: maximum number of pairs, spread evenly; 0 takes all.
        progress: called after each frame or photo.

    Raises:
        EvaluationError: if the layout is unknown, or nothing can be used.
    """
    layout, _ = find_layout(Path(path), [SPAIR, DAVIS, KEYPOINTS])
    if layout is DAVIS:
        return open_clips(path, progress=progress, sequences=sequences)
    return open_pairs(path, split=split, pairs=pairs, progress=progress)


def propagation(bench: Workbench, names: Sequence[str], options: PropagationOptions) -> Iterator[Line]:
    """Evaluate label propagation on each source, the first one as reference.

    Args:
        bench: workbench with videos.
        names: names of the sources.
        options: options of the propagation.

    Raises:
        PlanError: if an option is out of range.
        SizeError: if the size does not fit the patch grid.
        EvaluationError: if the data has no videos, or a name is unknown.
    """
    options.validate()
    data = bench.data
    if not isinstance(data, ClipData):
        raise EvaluationError(f"{data.name}: expected videos with masks of objects (DAVIS), got {data.layout}")
    yield from bench.measure(
        names,
        lambda source, advance: propagate(source, data, options, cache=bench.cache, progress=advance),
        options,
        task="propagation",
        looks="frames",
        count=len(data.val.images),
        outcome=Propagated,
        over="sequences",
    )


def matching(bench: Workbench, names: Sequence[str], options: MatchingOptions) -> Iterator[Line]:
    """Evaluate keypoint matching on each source, the first one as reference; a line for each alpha.

    Args:
        bench: workbench with pairs of photos.
        names: names of the sources.
        options: options of the search.

    Raises:
        PlanError: if an option is out of range.
        SizeError: if the size does not fit the patch grid.
        EvaluationError: if the data has no pairs, or a name is unknown.
    """
    options.validate()
    data = bench.data
    if not isinstance(data, PairData):
        raise EvaluationError(f"{data.name}: expected pairs of photos with keypoints, got {data.layout}")
    errors: dict[str, list[np.ndarray]] = {}

    def find(source: FeatureSource, advance: Callable[[], None], alpha: float) -> Matched:
        if source.name not in errors:
            errors[source.name] = match(source, data, options, cache=bench.cache, progress=advance)
        return Matched.within(errors[source.name], alpha)

    for alpha in options.alpha:
        yield from bench.measure(
            names,
            functools.partial(find, alpha=alpha),
            replace(options, alpha=(alpha,)),
            task="matching",
            looks="photos",
            count=looks(data),
            outcome=Matched,
            over="pairs",
        )
