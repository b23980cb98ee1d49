"""Object discovery evaluation: the share of images in which LOST's box covers an object (CorLoc)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import SplitData
from denoising_vit.evaluation.discovery.boxes import best_overlap, on_image
from denoising_vit.evaluation.discovery.layouts import DAVIS, BoxedImage
from denoising_vit.evaluation.discovery.lost import find_object
from denoising_vit.evaluation.discovery.options import DiscoveryOptions
from denoising_vit.evaluation.features import FeatureCache, see, shown_size
from denoising_vit.evaluation.outcomes import Measured
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.evaluation.workbench import Line, Workbench
from denoising_vit.views.crops import Crop


class Localised(Measured):
    """100 for each image with its object found, else 0; the mean is CorLoc in percent."""

    METRICS: ClassVar[tuple[str, ...]] = ("CorLoc",)


def localise(
    source: FeatureSource,
    data: SplitData[BoxedImage],
    options: DiscoveryOptions,
    *,
    cache: FeatureCache | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Localised:
    """Find one box in each image of ``val`` with LOST and compare it with the annotated boxes.

    CorLoc as in Siméoni et al. 2021: an image counts if the intersection over union of its box with any annotated box
    is at least 0.5, whatever the object is. They pad images to the patch grid and round COCO's boxes to whole pixels;
    here images are resized to it, and boxes stay as they are.

    Args:
        source: source of the features.
        data: images with their boxes.
        options: options of LOST.
        cache: feature cache.
        progress: called after each image.

    Raises:
        PlanError: if an option is out of range.
        SizeError: if the size does not fit the patch grid.
        EvaluationError: if features are not finite.
        PhotoError: if a photo can no longer be read.
    """
    options.validate()
    images = data.val.images
    shown = [(image, Crop.whole(shown_size(options.size, image, source))) for image in images]
    hits = []
    for (image, crop), features in zip(shown, see(source, shown, cache, progress), strict=True):
        found = find_object(features, options.seed_by, options.k, centred=options.centred)
        size = (image.height, image.width)
        box = on_image(found.box, found.mask.shape, source.patch_size, source.stride, crop.size, size)
        hits.append(100.0 if best_overlap(box, image.boxes) >= options.iou else 0.0)
    _, groups = np.unique([image.sequence for image in images], return_inverse=True)
    return Localised(np.array(hits)[:, None], groups.astype(np.int64))


def discovery(bench: Workbench, names: Sequence[str], options: DiscoveryOptions) -> Iterator[Line]:
    """Evaluate object discovery on each source, the first one as reference.

    Intervals of differences are over sequences, as frames of a sequence are nearly the same.

    Args:
        bench: workbench with images that have boxes.
        names: names of the sources.
        options: options of LOST.

    Yields:
        Lines of results, as :meth:`Workbench.compare`.

    Raises:
        PlanError: if an option is out of range.
        SizeError: if the size does not fit the patch grid.
        EvaluationError: if the data has no boxes, or a name is unknown.
    """
    options.validate()
    data = bench.data
    if not isinstance(data, SplitData) or not all(isinstance(image, BoxedImage) for image in data.val.images):
        raise EvaluationError(f"{data.name}: expected photos with boxes around their objects, got {data.layout}")
    yield from bench.measure(
        names,
        lambda source, advance: localise(source, data, options, cache=bench.cache, progress=advance),
        options,
        task="discovery",
        looks="images",
        count=len(data.val.images),
        outcome=Localised,
        over="sequences" if data.layout == DAVIS else "images",
    )
