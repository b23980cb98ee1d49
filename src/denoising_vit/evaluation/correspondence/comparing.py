"""Sources of features compared by correspondence: labels carried through videos, keypoints found in other photos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.comparison import Curve
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

    def judge(source: FeatureSource, _seeds: tuple[int, ...]) -> Iterator[tuple[int, Propagated, Curve]]:
        with bench.watch(f"{source.name}: frames", len(data.val.images)) as advance:
            yield 0, propagate(source, data, options, cache=bench.cache, progress=advance), []

    yield from bench.compare(
        names,
        judge,
        task="propagation",
        settings=asdict(options),
        seeds=(0,),
        size=options.size,
        outcome=Propagated,
        over="sequences",
    )


def matching(bench: Workbench, names: Sequence[str], options: MatchingOptions) -> Iterator[Line]:
    """Keypoint matching of each source, the first one being what others are held against.

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
        raise EvaluationError(f"{data.name}: expected pairs of photos with keypoints (SPair-71k), got {data.layout}")

    def judge(source: FeatureSource, _seeds: tuple[int, ...]) -> Iterator[tuple[int, Matched, Curve]]:
        with bench.watch(f"{source.name}: photos", looks(data)) as advance:
            yield 0, match(source, data, options, cache=bench.cache, progress=advance), []

    yield from bench.compare(
        names,
        judge,
        task="matching",
        settings=asdict(options),
        seeds=(0,),
        size=options.size,
        outcome=Matched,
        over="pairs",
    )
