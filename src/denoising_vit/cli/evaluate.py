"""``dvit evaluate``: the tasks, each with its data options.

A task is a verb here and an entry of `VERBS` in `app.py`. Its first argument is a subclass of :class:`EvaluateOptions`
that opens its data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import tyro

from denoising_vit.cli.comparison import EvaluateOptions, compare_sources
from denoising_vit.evaluation import correspondence as matched
from denoising_vit.evaluation import depth as metric_depth
from denoising_vit.evaluation import discovery as boxed
from denoising_vit.evaluation.depth import DepthOptions
from denoising_vit.evaluation.options import (
    ClusteringOptions,
    DiscoveryOptions,
    HummingbirdOptions,
    KnnOptions,
    MatchingOptions,
    PropagationOptions,
)
from denoising_vit.evaluation.segmentation import SegmentationOptions

if TYPE_CHECKING:
    from denoising_vit.evaluation.data import EvaluationData
    from denoising_vit.evaluation.labelled import LabelledData
    from denoising_vit.evaluation.workbench import Line, Workbench

_T = TypeVar("_T")

#: Options whose flags have no prefix; groups within them keep theirs.
Flat = Annotated[_T, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class LabelledOptions(EvaluateOptions):
    """Data, features and results of `dvit evaluate` on photos with class masks.

    Attributes:
        classes: file with class names, one per line, if the data have none.
        score: names of the classes to score, separated by commas, if the data have too few pixels of other classes;
            those can still be predicted.
    """

    classes: Path | None = None
    score: str = ""

    def open(self, progress: Callable[[], None]) -> LabelledData:
        """Photos with class masks."""
        from denoising_vit.evaluation.labelled import open_labelled

        score = tuple(name.strip() for name in self.score.split(",")) if self.score else ()
        data = open_labelled(self.data, classes=self.classes, images=self.images, progress=progress)
        return data.scoring(score)


def knn(
    shared: Flat[LabelledOptions],
    voting: tyro.conf.OmitArgPrefixes[KnnOptions] = KnnOptions(),  # noqa: B008, frozen
) -> int:
    """Nearest-neighbour segmentation: patches are labelled by the training patches with the nearest features.

    Data: VOCdevkit/VOC2012, ADEChallengeData2016, or a folder with train/ and val/, each with images/ and masks/ (index
    PNGs), and classes.txt.

    Args:
        shared: data, features and results.
        voting: options of the task.
    """
    from denoising_vit.evaluation.knn import knn as compare

    voting.validate()
    return compare_sources(shared, lambda bench, names: compare(bench, names, voting))


def segmentation(
    shared: Flat[LabelledOptions],
    training: tyro.conf.OmitArgPrefixes[SegmentationOptions] = SegmentationOptions(),  # noqa: B008, frozen
) -> int:
    """A linear probe (batch norm and a 1 x 1 convolution), trained on frozen features and scored at every pixel.

    Data: VOCdevkit/VOC2012, ADEChallengeData2016, or a folder with train/ and val/, each with images/ and masks/ (index
    PNGs), and classes.txt.

    Args:
        shared: data, features and results.
        training: options of the probe.
    """
    from denoising_vit.evaluation.segmentation import segmentation as compare

    training.protocol()
    return compare_sources(shared, lambda bench, names: compare(bench, names, training))


def hummingbird(
    shared: Flat[LabelledOptions],
    retrieval: tyro.conf.OmitArgPrefixes[HummingbirdOptions] = HummingbirdOptions(),  # noqa: B008, frozen
) -> int:
    """Dense nearest-neighbour retrieval (Hummingbird): pixels are labelled by a memory bank of training patches.

    Data: as for `dvit evaluate knn`, which is faster and scores patches.

    Args:
        shared: data, features and results.
        retrieval: options of the task.
    """
    from denoising_vit.evaluation.knn import hummingbird as compare

    retrieval.validate()
    return compare_sources(shared, lambda bench, names: compare(bench, names, retrieval))


def clustering(
    shared: Flat[LabelledOptions],
    grouping: tyro.conf.OmitArgPrefixes[ClusteringOptions] = ClusteringOptions(),  # noqa: B008, frozen
) -> int:
    """K-means clustering of patches (optionally with many more clusters than classes), scored against classes.

    Data: as for `dvit evaluate knn`; only the images of val are used.

    Args:
        shared: data, features and results.
        grouping: options of the task.
    """
    from denoising_vit.evaluation.clustering import clustering as compare

    grouping.validate()
    varied = ("clusters", "matching")
    return compare_sources(shared, lambda bench, names: compare(bench, names, grouping), varied)


@dataclass(frozen=True)
class DepthDataOptions(EvaluateOptions):
    """Data, features and results of `dvit evaluate depth`.

    Attributes:
        depth_scale: depth map units per metre; 1000 for millimetres.
        blocks: for data without splits, number of blocks of consecutive photos; each is evaluated in turn.
    """

    depth_scale: float = 1000.0
    blocks: int = 5

    def open(self, progress: Callable[[], None]) -> metric_depth.DepthData:
        """Photos with depth maps."""
        return metric_depth.open_depth(
            self.data, scale=self.depth_scale, images=self.images, blocks=self.blocks, progress=progress
        )


def depth(
    shared: Flat[DepthDataOptions],
    training: tyro.conf.OmitArgPrefixes[DepthOptions] = DepthOptions(),  # noqa: B008, frozen
) -> int:
    """Depth estimation with a linear probe on frozen features and class token, evaluated at every pixel.

    Data: NYUv2 as published (nyu_train.txt, nyu_test.txt), or rgb/ and depth/ with 16-bit PNGs with the same names, in
    the folder itself or in train/ and val/.

    Args:
        shared: data, features and results.
        training: options of the probe.
    """
    training.protocol()
    return compare_sources(shared, lambda bench, names: metric_depth.depth(bench, names, training))


@dataclass(frozen=True)
class BoxedOptions(EvaluateOptions):
    """Data, features and results of `dvit evaluate discovery`.

    Attributes:
        split: VOC: list in ImageSets/Main, by default trainval. COCO: part of the JSON file's name after instances_, if
            there are several. DAVIS: list of sequences in ImageSets.
        difficult: VOC: include objects marked as difficult or truncated.
        annotations: COCO: the JSON file, if the folder has several.
        names: COCO: file with the names or ids of the photos to use, one per line, as for COCO20k.
    """

    split: str | None = None
    difficult: bool = True
    annotations: Path | None = None
    names: Path | None = None

    def open(self, progress: Callable[[], None]) -> EvaluationData:
        """Photos with object boxes."""
        return boxed.open_boxed(
            self.data,
            images=self.images,
            split=self.split,
            difficult=self.difficult,
            annotations=self.annotations,
            names=self.names,
            progress=progress,
        )


def discovery(
    shared: Flat[BoxedOptions],
    finding: tyro.conf.OmitArgPrefixes[DiscoveryOptions] = DiscoveryOptions(),  # noqa: B008, frozen
) -> int:
    """Object discovery with LOST: percentage of images whose predicted box, from features alone, covers an object.

    Data: VOC2007 or VOC2012 (JPEGImages/, Annotations/, ImageSets/Main/trainval.txt), COCO (annotations/*.json and its
    photos), DAVIS (JPEGImages/480p, Annotations/480p), or images/ and masks/ of objects.

    Args:
        shared: data, features and results.
        finding: options of LOST.
    """
    finding.validate()
    return compare_sources(shared, lambda bench, names: boxed.discovery(bench, names, finding))


@dataclass(frozen=True)
class MatchedOptions(EvaluateOptions):
    """Data, features and results of `dvit evaluate correspondence`.

    Attributes:
        split: split of SPair-71k: trn, val or test.
    """

    split: str = "test"

    def open(self, progress: Callable[[], None]) -> EvaluationData:
        """Videos with masks, or pairs of photos with keypoints."""
        count = self.images
        return matched.open_correspondence(self.data, sequences=count, split=self.split, pairs=count, progress=progress)


def correspondence(
    shared: Flat[MatchedOptions],
    videos: PropagationOptions = PropagationOptions(),  # noqa: B008, frozen
    pairs: MatchingOptions = MatchingOptions(),  # noqa: B008, frozen
) -> int:
    """Correspondence: label propagation through videos (J and F), or keypoint matching between photos (PCK).

    The data determine the task: DAVIS 2016 or 2017 (JPEGImages/480p, Annotations/480p) for propagation; SPair-71k
    (JPEGImages/, PairAnnotation/), or photos in images/ with keypoints/NAME.json: {"keypoints": {"left eye": [x, y]}},
    optionally with "box": [x0, y0, x1, y1], for matching. --images counts sequences, or pairs.

    Args:
        shared: features, data and results.
        videos: options of label propagation.
        pairs: options of keypoint matching.
    """
    videos.validate()
    pairs.validate()

    def compare(bench: Workbench, names: Sequence[str]) -> Iterator[Line]:
        if isinstance(bench.data, matched.ClipData):
            return matched.propagation(bench, names, videos)
        return matched.matching(bench, names, pairs)

    return compare_sources(shared, compare, varied=("alpha",))
