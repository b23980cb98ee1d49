"""Some of a data set, where all of it would be more than is needed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from denoising_vit.data.items import Skipped
from denoising_vit.data.reading import Dataset

#: Decoding threads; whoever takes the photos has a model that takes all processors otherwise.
_DECODERS = 2


def spread(count: int, wanted: int) -> list[int]:
    """Indices of so many items, evenly over all of them, since neighbours are often alike; 0 takes all."""
    if wanted == 0 or wanted >= count:
        return list(range(count))
    return [int((number + 0.5) * count / wanted) for number in range(wanted)]


def named_photos(dataset: Dataset, indices: list[int]) -> Iterator[tuple[str, np.ndarray | Skipped]]:
    """Photos of a data set by their ids, decoded ahead: pixels (H, W, 3) uint8, or why there are none."""
    for index, pixels in dataset.stream(indices, workers=_DECODERS, ahead=2 * _DECODERS):
        yield dataset[index].id, pixels
