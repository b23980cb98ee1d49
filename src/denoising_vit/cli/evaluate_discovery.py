"""``dvit evaluate discovery``: object discovery with LOST."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.comparison import EvaluateOptions, compare_sources
from denoising_vit.evaluation import discovery as evaluation
from denoising_vit.evaluation.options import DiscoveryOptions, FieldOptions

if TYPE_CHECKING:
    from denoising_vit.evaluation.data import EvaluationData
    from denoising_vit.evaluation.workbench import Line, Workbench


def discovery(
    judged: tyro.conf.OmitArgPrefixes[EvaluateOptions],
    split: str | None = None,
    difficult: bool = True,
    annotations: Path | None = None,
    names: Path | None = None,
    finding: tyro.conf.OmitArgPrefixes[DiscoveryOptions] = DiscoveryOptions(),  # noqa: B008, frozen
    exact: FieldOptions = FieldOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Object discovery with LOST: the share of images in which its box, found from features alone, is on an object.

    Data: VOC2007 or VOC2012 (JPEGImages/, Annotations/, ImageSets/Main/trainval.txt), COCO (annotations/*.json and its
    photos), DAVIS (JPEGImages/480p, Annotations/480p), or images/ and masks/ of objects.

    Args:
        judged: features, data and results.
        split: VOC: list in ImageSets/Main, by default trainval. COCO: part after instances_ in the name of the JSON
            file, if there are several. DAVIS: list of sequences in ImageSets.
        difficult: VOC: include objects marked as difficult or truncated.
        annotations: COCO: the JSON file, if the folder has several.
        names: COCO: file with the names or ids of the photos to use, one a line, as for COCO20k.
        finding: options of LOST.
        exact: options of stage 1, for exact features.
        model: the backbone and its options.
        json: print the lines of results instead of a table.
    """
    finding.validate()

    def opened(progress: Callable[[], None]) -> EvaluationData:
        return evaluation.open_boxed(
            judged.data,
            images=judged.images,
            split=split,
            difficult=difficult,
            annotations=annotations,
            names=names,
            progress=progress,
        )

    def compare(bench: Workbench, features: Sequence[str]) -> Iterator[Line]:
        return evaluation.discovery(bench, features, finding)

    return compare_sources(judged, exact, model, opened, compare, as_json=json)
