"""Object discovery by LOST: find one object of an image from its patch features alone, and score its box (CorLoc).

Siméoni et al., "Localizing Objects with Self-Supervised Transformers and no Labels" (BMVC 2021). Patches of an object
are similar to each other and to few others, so the seed, the patch with the fewest similar patches, lies on an object.
The paper uses keys of the last attention layer; here any features can be used. The paper's code requires sums above 0,
the paper 0 or more; this implementation follows the paper.

Ranking by norm follows "Denoising Vision Transformers" (Yang et al. 2024, section 5.2 and supplement B). It says of
denoised features that "the feature norm is a good candidate" but gives neither details nor code. In our
interpretation, norms replace degrees in the choice of the seed and the candidates, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.ndimage import binary_propagation
from torch import Tensor
from torchvision.ops import box_iou

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.data import Box
from denoising_vit.evaluation.discovery.annotations import CellBox, box_around
from denoising_vit.evaluation.discovery.layouts import DAVIS, BoxedData
from denoising_vit.evaluation.features import FeatureCache, see
from denoising_vit.evaluation.options import DiscoveryOptions, SeedBy
from denoising_vit.evaluation.outcomes import Measured
from denoising_vit.evaluation.patches import whole_images
from denoising_vit.evaluation.sources import FeatureSource
from denoising_vit.evaluation.workbench import Line, Workbench

#: Maximum number of similarities (patches x patches) in memory.
_AT_ONCE = 2**24


@dataclass(frozen=True, eq=False)
class Discovered:
    """One discovered object.

    Attributes:
        seed: row and column of the seed patch.
        mask: (h, w) bool, the object's patches.
        box: smallest box around these patches, in patches.
    """

    seed: tuple[int, int]
    mask: np.ndarray
    box: CellBox


def find_object(features: Tensor, seed_by: SeedBy = "degree", k: int = 100, *, centred: bool = False) -> Discovered:
    """Find one object with LOST.

    Args:
        features: patch features (h, w, C) of an image.
        seed_by: ranking of the patches; the first is the seed.
        k: number of top-ranked patches that may support the seed, at most all.
        centred: subtract the image's mean feature first. Patches count as similar if their inner product is not
            negative, so if features have a large common component, all are similar and the whole image is the object.

    Raises:
        EvaluationError: if features are not a grid, or not finite.
    """
    if features.ndim != 3 or 0 in features.shape or not torch.isfinite(features).all():
        raise EvaluationError(f"expected finite features of patches (h, w, C), got {tuple(features.shape)}")
    grid = (features.shape[0], features.shape[1])
    # Only signs matter, and in float64, products and sums of float16 values are nearly exact.
    flat = features.flatten(0, 1).double()
    if centred:
        flat = flat - flat.mean(0)
    ranked = ranking(flat, seed_by)
    seed = divmod(int(ranked[0]), grid[1])
    mask = component(expanded(flat, ranked, k).reshape(grid).cpu().numpy(), seed)
    return Discovered(seed, mask, box_around(mask))


def degrees(features: Tensor) -> Tensor:
    """Number of patches similar to each patch, (n,) int64, including itself, from features (n, C)."""
    parts = features.split(max(_AT_ONCE // len(features), 1))
    return torch.cat([(part @ features.T >= 0).sum(1) for part in parts])


def ranking(features: Tensor, by: SeedBy) -> Tensor:
    """Patches (n,) by degree, lowest first, or by norm, largest first, from features (n, C); ties keep their order."""
    if by == "degree":
        return degrees(features).argsort(stable=True)
    return features.norm(dim=1).argsort(stable=True, descending=True)


def expanded(features: Tensor, ranked: Tensor, k: int) -> Tensor:
    """Patches (n,) bool of the seed's object, connected to it or not; the first in the ranking is the seed.

    Candidates similar to the seed support it; a patch q belongs to the object if the sum of f_q · f_s over these
    candidates s is not negative.
    """
    seed, candidates = ranked[0], ranked[:k]
    support = candidates[features[candidates] @ features[seed] >= 0]
    belongs = features @ features[support].sum(0) >= 0
    belongs[seed] = True  # its sum is 0 or more, but rounding may make it negative
    return belongs


def component(mask: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    """The connected component of a mask (h, w) that contains the seed; patches are connected by shared sides."""
    start = np.zeros(mask.shape, dtype=bool)
    start[seed] = True
    return np.asarray(binary_propagation(start, mask=mask), dtype=bool)


# --- evaluation ---


def on_image(
    box: CellBox, grid: tuple[int, int], patch_size: int, stride: int, shown: tuple[int, int], size: tuple[int, int]
) -> Box:
    """Convert a box from patches to pixels of the image.

    Each pixel belongs to the patch with the nearest centre; without overlap, to the patch that contains it. The box is
    in patches of a ``grid`` (h, w); the model's input shows the image of size (H, W) at ``shown`` pixels (H, W).
    """
    (rows, columns), (height, width) = grid, size
    x0, x1 = (_edge(place, columns, patch_size, stride, shown[1], width) for place in (box[0], box[2]))
    y0, y1 = (_edge(place, rows, patch_size, stride, shown[0], height) for place in (box[1], box[3]))
    return x0, y0, x1, y1


def _edge(place: int, count: int, patch_size: int, stride: int, shown: int, size: int) -> float:
    """Position in image pixels where patch ``place`` begins; the last patch ends at the image border."""
    if place in (0, count):
        return 0.0 if place == 0 else float(size)
    return (place * stride + (patch_size - stride) / 2) * size / shown


def best_overlap(box: Box, boxes: Sequence[Box]) -> float:
    """Largest intersection over union of a box with any of ``boxes``, in [0, 1]."""
    found, known = (torch.tensor(some, dtype=torch.float64) for some in ([box], list(boxes)))
    return float(box_iou(found, known).max())


class Localised(Measured):
    """100 for each image whose object was found, else 0; the mean is CorLoc in percent."""

    METRICS: ClassVar[tuple[str, ...]] = ("CorLoc",)


def localise(
    source: FeatureSource,
    data: BoxedData,
    options: DiscoveryOptions,
    *,
    cache: FeatureCache | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Localised:
    """Find one box in each image of ``val`` with LOST and compare it with the annotated boxes.

    CorLoc as in Siméoni et al. 2021: an image counts as correct if the intersection over union of its box with any
    annotated box is at least 0.5, whatever the object's class. They pad images to the patch grid and round COCO's boxes
    to whole pixels; here images are resized to the grid, and boxes are not rounded.
    """
    options.validate()
    shown = whole_images(data.val.images, options.size, source)
    hits = []
    for (image, crop), features in zip(shown, see(source, shown, cache, progress), strict=True):
        found = find_object(features, options.seed_by, options.k, centred=options.centred)
        size = (image.height, image.width)
        box = on_image(found.box, found.mask.shape, *source.patch, crop.size, size)
        hits.append(100.0 if best_overlap(box, image.boxes) >= options.iou else 0.0)
    _, groups = np.unique([image.sequence for image, _ in shown], return_inverse=True)
    return Localised(np.array(hits)[:, None], groups.astype(np.int64))


def discovery(bench: Workbench, names: Sequence[str], options: DiscoveryOptions) -> Iterator[Line]:
    """Evaluate object discovery on each source, with the first as the reference.

    Intervals of differences are over sequences, because frames of a sequence are nearly the same.
    """
    options.validate()
    data = bench.data_of(BoxedData, "photos with boxes around their objects")
    over = "sequences" if data.layout == DAVIS else "images"
    task = bench.untrained("discovery", localise, data, options, outcome=Localised, over=over)
    yield from bench.compare(names, task)
