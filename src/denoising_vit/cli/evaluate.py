"""``dvit evaluate`` on photos with masks of classes: sources of features, judged alike by several tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.judging import Judged, open_bench, tell
from denoising_vit.evaluation.options import ClusteringOptions, FieldOptions, HummingbirdOptions, KnnOptions
from denoising_vit.evaluation.segmentation import SegmentationOptions
from denoising_vit.extractors import KINDS, parse_names

if TYPE_CHECKING:
    from denoising_vit.evaluation.labelled import LabelledData
    from denoising_vit.evaluation.workbench import Workbench


@dataclass(frozen=True)
class JudgedClasses(Judged):
    """What is judged, where photos have masks of classes.

    Attributes:
        classes: file with one class name a line, where the data has none.
        score: names of classes, separated by commas, that scores are of, where the data hold too little of the others;
            these can still be predicted.
    """

    classes: Path | None = None
    score: str = ""


def knn(
    judged: tyro.conf.OmitArgPrefixes[JudgedClasses],
    voting: tyro.conf.OmitArgPrefixes[KnnOptions] = KnnOptions(),  # noqa: B008, frozen
    exact: FieldOptions = FieldOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Nearest-neighbour segmentation: patches are labelled by the training patches with the nearest features.

    Data: VOCdevkit/VOC2012, ADEChallengeData2016, or a folder with train/ and val/, each with images/ and masks/ (index
    PNGs), and classes.txt.

    Args:
        judged: what is judged.
        voting: how.
        exact: how stage 1 is done, where exact features are judged.
        model: the backbone, and how it is run.
        json: print the lines of results instead of a table.
    """
    voting.validate()
    names = parse_names(judged.features, KINDS)
    exact.denoising()
    return tell(judged, lambda: _bench(judged, exact, model).knn(names, voting), as_json=json)


def segmentation(
    judged: tyro.conf.OmitArgPrefixes[JudgedClasses],
    training: tyro.conf.OmitArgPrefixes[SegmentationOptions] = SegmentationOptions(),  # noqa: B008, frozen
    exact: FieldOptions = FieldOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """A linear probe: batch norm and a 1 x 1 convolution, trained on frozen features, judged at every pixel.

    Data: VOCdevkit/VOC2012, ADEChallengeData2016, or a folder with train/ and val/, each with images/ and masks/ (index
    PNGs), and classes.txt.

    Args:
        judged: what is judged.
        training: how the probe is trained.
        exact: how stage 1 is done, where exact features are judged.
        model: the backbone, and how it is run.
        json: print the lines of results instead of a table.
    """
    training.protocol()
    names = parse_names(judged.features, KINDS)
    exact.denoising()
    return tell(judged, lambda: _bench(judged, exact, model).segmentation(names, training), as_json=json)


def hummingbird(
    judged: tyro.conf.OmitArgPrefixes[JudgedClasses],
    retrieval: tyro.conf.OmitArgPrefixes[HummingbirdOptions] = HummingbirdOptions(),  # noqa: B008, frozen
    exact: FieldOptions = FieldOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Dense nearest-neighbour retrieval (Hummingbird): pixels are labelled by a memory bank of training patches.

    Data: as for `dvit evaluate knn`, which is the quick look: it scores patches.

    Args:
        judged: what is judged.
        retrieval: how.
        exact: how stage 1 is done, where exact features are judged.
        model: the backbone, and how it is run.
        json: print the lines of results instead of a table.
    """
    from denoising_vit.evaluation.hummingbird import hummingbird as compare_retrieval

    retrieval.validate()
    names = parse_names(judged.features, KINDS)
    exact.denoising()
    return tell(judged, lambda: compare_retrieval(_bench(judged, exact, model), names, retrieval), as_json=json)


def clustering(
    judged: tyro.conf.OmitArgPrefixes[JudgedClasses],
    grouping: tyro.conf.OmitArgPrefixes[ClusteringOptions] = ClusteringOptions(),  # noqa: B008, frozen
    exact: FieldOptions = FieldOptions(),  # noqa: B008, frozen
    model: tyro.conf.OmitArgPrefixes[BackboneSpec] = BackboneSpec(),  # noqa: B008, frozen
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Clusters of patches (k-means, also many more than there are classes), given classes by their pixels.

    Data: as for `dvit evaluate knn`; only the images of val are looked at.

    Args:
        judged: what is judged.
        grouping: how.
        exact: how stage 1 is done, where exact features are judged.
        model: the backbone, and how it is run.
        json: print the lines of results instead of a table.
    """
    from denoising_vit.evaluation.clustering import clustering as compare_clusters

    grouping.validate()
    names = parse_names(judged.features, KINDS)
    exact.denoising()
    return tell(
        judged,
        lambda: compare_clusters(_bench(judged, exact, model), names, grouping),
        as_json=json,
        varied=("clusters", "matching"),
    )


def _bench(judged: JudgedClasses, exact: FieldOptions, model: BackboneSpec) -> Workbench:
    from denoising_vit.evaluation.labelled import open_labelled

    score = tuple(name.strip() for name in judged.score.split(",")) if judged.score else ()

    def labelled(progress: Callable[[], None]) -> LabelledData:
        data = open_labelled(judged.data, classes=judged.classes, images=judged.images, progress=progress)
        return data.scoring(score)

    return open_bench(judged, exact, model, labelled)
