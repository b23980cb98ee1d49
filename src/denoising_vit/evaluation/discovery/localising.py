"""CorLoc: of how many images the one box that is found covers an object."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np

from denoising_vit.evaluation.data import SplitData
from denoising_vit.evaluation.discovery.boxes import best_overlap, on_image
from denoising_vit.evaluation.discovery.images import BoxedImage
from denoising_vit.evaluation.discovery.lost import find_object
from denoising_vit.evaluation.discovery.options import DiscoveryOptions
from denoising_vit.evaluation.features import FeatureCache, see, shown_size
from denoising_vit.evaluation.outcomes import Measured
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.views.crops import Crop


class Localised(Measured):
    """Whether an object was found, of each image: 100 or 0, so that the mean is CorLoc in percent."""

    METRICS: ClassVar[tuple[str, ...]] = ("CorLoc",)


def localise(
    source: FeatureSource,
    data: SplitData[BoxedImage],
    options: DiscoveryOptions,
    *,
    cache: FeatureCache | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Localised:
    """Finds one box in each image of ``val`` by LOST and holds it against the boxes that are known.

    CorLoc as in Siméoni et al. 2021: an image counts where its box and any known one have an intersection over union
    of 0.5 at least, whatever the object is. They pad images to the patch grid and round COCO's boxes to whole pixels;
    here images are resized to it, and boxes are as they are.

    Args:
        source: of the features.
        data: the images with their boxes.
        options: how.
        cache: where features are kept.
        progress: called after each image.

    Raises:
        PlanError: if an option is out of range.
        SizeError: if the size does not fit the patch grid.
        EvaluationError: if features are not finite.
        PhotoError: if a photo cannot be read any more.
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
