"""How alike each feature is to that of one patch, as a colour."""

from __future__ import annotations

import numpy as np

from denoising_vit.maps.colouring import lookup
from denoising_vit.maps.pca import RESOLUTION, Features, to_arrays

SIMILARITY_COLOURS = "RdBu_r"


def similarity_maps(*features: Features, at: tuple[int, int] | None = None) -> list[np.ndarray]:
    """The cosine of each feature with its own map's feature at one patch: red alike, white unrelated, blue opposite.

    Features of a ViT share a large mean, next to which all cosines are close to 1. The mean over all maps is
    therefore taken off first (one mean for all, each map counting alike, so that the maps stay comparable), and 0
    means "no more alike than any two patches". The colours always span [-1, 1]. Where a centred feature is zero,
    as it is everywhere in a constant map, the similarity is drawn as 0.

    Args:
        *features: maps (h, w, C).
        at: (row, column) of the patch in the first map, the centre if None; in maps of another size the patch at
            the same place of the image.

    Returns:
        One picture (h, w, 3) uint8 for each map.

    Raises:
        ValueError: if ``at`` is outside the first map, a map is not (h, w, C), channels differ, or values are not
            finite.
    """
    arrays = to_arrays(*features, maps=True)
    height, width = arrays[0].shape[:2]
    row, column = at if at is not None else (height // 2, width // 2)
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"at must be (row, column) within the {height} x {width} grid of the first map, got {at}")
    mean = np.mean([array.mean((0, 1), dtype=np.float64) for array in arrays], axis=0).astype(np.float32)
    pictures = []
    for array in arrays:
        scale = float(np.abs(array).max()) or 1.0
        centred = (array - mean) / scale
        place = (2 * row + 1) * len(array) // (2 * height), (2 * column + 1) * array.shape[1] // (2 * width)
        lengths = np.linalg.norm(centred, axis=-1)
        products = lengths * lengths[place]
        real = (lengths > RESOLUTION) & (lengths[place] > RESOLUTION)
        cosines = np.divide(centred @ centred[place], products, out=np.zeros_like(products), where=real)
        pictures.append(lookup((cosines + 1) / 2, SIMILARITY_COLOURS))
    return pictures
