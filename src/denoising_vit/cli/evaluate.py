"""``dvit evaluate`` on photos with class masks: nearest neighbours, linear probes, retrieval and clusters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.comparison import EvaluateOptions, compare_sources
from denoising_vit.evaluation.options import ClusteringOptions, FieldOptions, HummingbirdOptions, KnnOptions
from denoising_vit.evaluation.segmentation import SegmentationOptions

if TYPE_CHECKING:
    from denoising_vit.evaluation.labelled import LabelledData
    from denoising_vit.evaluation.workbench import Line, Workbench


@dataclass(frozen=True)
class LabelledOptions(EvaluateOptions):
    """Data, features and results of `dvit evaluate` on photos with class masks.

    Attributes:
        classes: file with one class name a line, if the data has none.
        score: names of the classes to score, separated by commas, if the data hold too little of the others; these can
            still be predicted.
    """

    classes: Path | None = None
    score: str = ""


def knn(
    judged: tyro.conf.OmitArgPrefixes[LabelledOptions],
    voting: tyro.conf.OmitArgPrefixes[KnnOptions] = KnnOptions(),  # noqa: B008, frozen
    exact: FieldOptions = FieldOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Nearest-neighbour segmentation: patches are labelled by the training patches with the nearest features.

    Data: VOCdevkit/VOC2012, ADEChallengeData2016, or a folder with train/ and val/, each with images/ and masks/ (index
    PNGs), and classes.txt.

    Args:
        judged: data, features and results.
        voting: options of the task.
        exact: options of stage 1 for exact features.
        model: the backbone.
        json: print lines of results instead of a table.
    """
    from denoising_vit.evaluation.knn import knn as compare

    voting.validate()
    return _compare(judged, exact, model, lambda bench, names: compare(bench, names, voting), json)


def segmentation(
    judged: tyro.conf.OmitArgPrefixes[LabelledOptions],
    training: tyro.conf.OmitArgPrefixes[SegmentationOptions] = SegmentationOptions(),  # noqa: B008, frozen
    exact: FieldOptions = FieldOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """A linear probe (batch norm and a 1 x 1 convolution), trained on frozen features and scored at every pixel.

    Data: VOCdevkit/VOC2012, ADEChallengeData2016, or a folder with train/ and val/, each with images/ and masks/ (index
    PNGs), and classes.txt.

    Args:
        judged: data, features and results.
        training: options of the probe.
        exact: options of stage 1 for exact features.
        model: the backbone.
        json: print lines of results instead of a table.
    """
    from denoising_vit.evaluation.segmentation import segmentation as compare

    training.protocol()
    return _compare(judged, exact, model, lambda bench, names: compare(bench, names, training), json)


def hummingbird(
    judged: tyro.conf.OmitArgPrefixes[LabelledOptions],
    retrieval: tyro.conf.OmitArgPrefixes[HummingbirdOptions] = HummingbirdOptions(),  # noqa: B008, frozen
    exact: FieldOptions = FieldOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Dense nearest-neighbour retrieval (Hummingbird): pixels are labelled by a memory bank of training patches.

    Data: as for `dvit evaluate knn`, which is faster and scores patches.

    Args:
        judged: data, features and results.
        retrieval: options of the task.
        exact: options of stage 1 for exact features.
        model: the backbone.
        json: print lines of results instead of a table.
    """
    from denoising_vit.evaluation.hummingbird import hummingbird as compare

    retrieval.validate()
    return _compare(judged, exact, model, lambda bench, names: compare(bench, names, retrieval), json)


def clustering(
    judged: tyro.conf.OmitArgPrefixes[LabelledOptions],
    grouping: tyro.conf.OmitArgPrefixes[ClusteringOptions] = ClusteringOptions(),  # noqa: B008, frozen
    exact: FieldOptions = FieldOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Clusters of patches (k-means, also many more than there are classes), given classes by their pixels.

    Data: as for `dvit evaluate knn`; only the images of val are used.

    Args:
        judged: data, features and results.
        grouping: options of the task.
        exact: options of stage 1 for exact features.
        model: the backbone.
        json: print lines of results instead of a table.
    """
    from denoising_vit.evaluation.clustering import clustering as compare

    grouping.validate()
    varied = ("clusters", "matching")
    return _compare(judged, exact, model, lambda bench, names: compare(bench, names, grouping), json, varied)


def _compare(
    options: LabelledOptions,
    exact: FieldOptions,
    model: BackboneSpec,
    compare: Callable[[Workbench, Sequence[str]], Iterator[Line]],
    as_json: bool,
    varied: Sequence[str] = (),
) -> int:
    from denoising_vit.evaluation.labelled import open_labelled

    score = tuple(name.strip() for name in options.score.split(",")) if options.score else ()

    def labelled(progress: Callable[[], None]) -> LabelledData:
        data = open_labelled(options.data, classes=options.classes, images=options.images, progress=progress)
        return data.scoring(score)

    return compare_sources(options, exact, model, labelled, compare, as_json=as_json, varied=varied)
