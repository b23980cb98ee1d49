"""The figures of each task: how they are named, how precisely they are told, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        name: in results and tables.
        digits: decimals that are told.
        lower: whether less is better.
    """

    name: str
    digits: int = 2
    lower: bool = False


#: Mean intersection over union, mean accuracy of classes, accuracy of pixels; in percent.
_CLASSES = (Metric("mIoU"), Metric("mAcc"), Metric("aAcc"))

#: Of each task that compares with a truth; the first is what differences are told of.
METRICS: dict[str, tuple[Metric, ...]] = {
    "knn": _CLASSES,
    "segmentation": _CLASSES,
    "hummingbird": _CLASSES,
    "clustering": _CLASSES,
    # Metres; relative; decades; percent of pixels within 1.25, 1.25^2, 1.25^3 of the truth.
    "depth": (
        Metric("RMSE", 4, lower=True),
        Metric("AbsRel", 4, lower=True),
        Metric("log10", 4, lower=True),
        Metric("a1"),
        Metric("a2"),
        Metric("a3"),
    ),
    # Percent of images whose one box covers an object.
    "discovery": (Metric("CorLoc"),),
    # Percent: region similarity and contour accuracy of DAVIS, and their mean.
    "propagation": (Metric("J&F"), Metric("J"), Metric("F")),
    # Percent of keypoints within a share of the object's larger side: mean over pairs, and of all keypoints.
    "matching": (Metric("PCK"), Metric("PCK per point")),
}


def main_metric(task: str) -> Metric:
    """What differences are told of."""
    return METRICS[task][0]
