"""Sources of features compared by correspondence: labels carried through videos, keypoints found in other photos."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.correspondence.clips import ClipData
from denoising_vit.evaluation.correspondence.matched import Matched, looks, match
from denoising_vit.evaluation.correspondence.options import MatchingOptions, PropagationOptions
from denoising_vit.evaluation.correspondence.pairs import PairData
from denoising_vit.evaluation.correspondence.propagated import Propagated, propagate
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.evaluation.workbench import Line, Workbench


def propagation(bench: Workbench, names: Sequence[str], options: PropagationOptions) -> Iterator[Line]:
    """Label propagation of each source, the first one being what others are held against.

    Args:
        bench: with videos as data.
        names: of the sources.
        options: how labels are carried.

    Raises:
        PlanError: if an option is out of range.
        SizeError: if the size does not fit the patch grid.
        EvaluationError: if the data are no videos, or a name is unknown.
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
    """Keypoint matching of each source, the first one being what others are held against; a line for each alpha.

    Args:
        bench: with pairs of photos as data.
        names: of the sources.
        options: how keypoints are looked for.

    Raises:
        PlanError: if an option is out of range.
        SizeError: if the size does not fit the patch grid.
        EvaluationError: if the data are no pairs, or a name is unknown.
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
