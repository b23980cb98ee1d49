"""``dvit evaluate knn`` and ``segmentation``: sources of features, judged alike on photos with masks of classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tyro

from denoising_vit.backbones import BackboneSpec
from denoising_vit.cli.judging import Judged, open_bench, tell
from denoising_vit.evaluation.fields import FieldOptions
from denoising_vit.evaluation.knn import KnnOptions
from denoising_vit.evaluation.labelled import LabelledData, open_labelled
from denoising_vit.evaluation.named_sources import SOURCES
from denoising_vit.evaluation.segmentation import SegmentationOptions
from denoising_vit.evaluation.workbench import Workbench
from denoising_vit.extractors import parse_names


def knn(
    judged: tyro.conf.OmitArgPrefixes[Judged],
    classes: Path | None = None,
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
        classes: file with one class name a line, where the data has none.
        voting: how.
        exact: how stage 1 is done, where exact features are judged.
        model: the backbone, and how it is run.
        json: print the lines of results instead of a table.
    """
    voting.validate()
    names = parse_names(judged.features, SOURCES)
    exact.denoising()
    return tell(judged, lambda: _bench(judged, classes, exact, model).knn(names, voting), as_json=json)


def segmentation(
    judged: tyro.conf.OmitArgPrefixes[Judged],
    classes: Path | None = None,
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
        classes: file with one class name a line, where the data has none.
        training: how the probe is trained.
        exact: how stage 1 is done, where exact features are judged.
        model: the backbone, and how it is run.
        json: print the lines of results instead of a table.
    """
    training.protocol()
    names = parse_names(judged.features, SOURCES)
    exact.denoising()
    return tell(judged, lambda: _bench(judged, classes, exact, model).segmentation(names, training), as_json=json)


def _bench(judged: Judged, classes: Path | None, exact: FieldOptions, model: BackboneSpec) -> Workbench:
    def labelled(progress: Callable[[], None]) -> LabelledData:
        return open_labelled(judged.data, classes=classes, images=judged.images, progress=progress)

    return open_bench(judged, exact, model, labelled)
