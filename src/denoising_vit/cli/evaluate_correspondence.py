"""``dvit evaluate correspondence``: label propagation and keypoint matching."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import tyro

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.comparison import EvaluateOptions, compare_sources
from denoising_vit.evaluation import correspondence as evaluation
from denoising_vit.evaluation.options import FieldOptions, MatchingOptions, PropagationOptions

if TYPE_CHECKING:
    from denoising_vit.evaluation.data import EvaluationData
    from denoising_vit.evaluation.workbench import Line, Workbench


def correspondence(
    judged: tyro.conf.OmitArgPrefixes[EvaluateOptions],
    split: str = "test",
    videos: PropagationOptions = PropagationOptions(),  # noqa: B008, frozen
    pairs: MatchingOptions = MatchingOptions(),  # noqa: B008, frozen
    exact: FieldOptions = FieldOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Correspondence: label propagation through videos (J and F), or keypoint matching between photos (PCK).

    The data decides the task: DAVIS 2016 or 2017 (JPEGImages/480p, Annotations/480p) for propagation; SPair-71k
    (JPEGImages/, PairAnnotation/), or photos in images/ with keypoints/NAME.json: {"keypoints": {"left eye": [x, y]}},
    optionally with "box": [x0, y0, x1, y1], for matching. --images counts sequences, or pairs.

    Args:
        judged: features, data and results.
        split: split of SPair-71k: trn, val or test.
        videos: options of label propagation.
        pairs: options of keypoint matching.
        exact: options of stage 1, for exact features.
        model: the backbone and its options.
        json: print the lines of results instead of a table.
    """
    videos.validate()
    pairs.validate()

    def opened(progress: Callable[[], None]) -> EvaluationData:
        count = judged.images
        return evaluation.open_correspondence(judged.data, sequences=count, split=split, pairs=count, progress=progress)

    def compare(bench: Workbench, names: Sequence[str]) -> Iterator[Line]:
        if isinstance(bench.data, evaluation.ClipData):
            return evaluation.propagation(bench, names, videos)
        return evaluation.matching(bench, names, pairs)

    return compare_sources(judged, exact, model, opened, compare, as_json=json, varied=("alpha",))
