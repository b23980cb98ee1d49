"""LOST: find one object of an image from its patch features alone.

Siméoni et al., "Localizing Objects with Self-Supervised Transformers and no Labels" (BMVC 2021). Patches of an object
are similar to each other and to few others, so the patch with the fewest similar patches, the seed, lies on an object.
The paper uses keys of the last attention layer; here any features are used. The paper's code requires sums above 0 and
the paper 0 or more; this implementation follows the paper.

Ranking by norm follows "Denoising Vision Transformers" (Yang et al. 2024, section 5.2 and supplement B), which says of
denoised features that "the feature norm is a good candidate" and gives neither details nor code. Our interpretation:
norms replace degrees in the choice of the seed and the candidates, and nothing else changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import binary_propagation
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.evaluation.discovery.boxes import CellBox, box_around
from denoising_vit.evaluation.discovery.options import SeedBy

#: Maximum number of similarities (patches x patches) in memory.
_AT_ONCE = 2**24


@dataclass(frozen=True, eq=False)
class Discovered:
    """One object.

    Attributes:
        seed: row and column of the seed patch.
        mask: (h, w) bool, the object's patches.
        box: smallest box around them, in patches.
    """

    seed: tuple[int, int]
    mask: np.ndarray
    box: CellBox


def find_object(features: Tensor, seed_by: SeedBy = "degree", k: int = 100, *, centred: bool = False) -> Discovered:
    """Find one object with LOST.

    Args:
        features: patch features (h, w, C) of an image.
        seed_by: ranking of the patches; the first is the seed.
        k: number of first patches in the ranking that may support the seed, at most all.
        centred: subtract the image's mean feature first. Patches are similar if their inner product is not negative,
            so features with a large common part are all similar, and the whole image is the object.

    Raises:
        EvaluationError: if features are no grid, or not finite.
    """
    if features.ndim != 3 or 0 in features.shape or not torch.isfinite(features).all():
        raise EvaluationError(f"expected finite features of patches (h, w, C), got {tuple(features.shape)}")
    grid = (features.shape[0], features.shape[1])
    # Only signs matter: in float64, products and sums of float16 values are nearly exact.
    flat = features.flatten(0, 1).double()
    if centred:
        flat = flat - flat.mean(0)
    ranked = ranking(flat, seed_by)
    seed = divmod(int(ranked[0]), grid[1])
    mask = component(expanded(flat, ranked, k).reshape(grid).cpu().numpy(), seed)
    return Discovered(seed, mask, box_around(mask))


def degrees(features: Tensor) -> Tensor:
    """Number of patches similar to each, (n,) int64, including itself, from features (n, C)."""
    parts = features.split(max(_AT_ONCE // len(features), 1))
    return torch.cat([(part @ features.T >= 0).sum(1) for part in parts])


def ranking(features: Tensor, by: SeedBy) -> Tensor:
    """Patches (n,) by degree, lowest first, or by norm, largest first, from features (n, C); ties keep their order."""
    if by == "degree":
        return degrees(features).argsort(stable=True)
    return features.norm(dim=1).argsort(stable=True, descending=True)


def expanded(features: Tensor, ranked: Tensor, k: int) -> Tensor:
    """Patches that belong to the seed's object, connected to it or not.

    Candidates similar to the seed support it; a patch q belongs to the object if the sum of f_q · f_s over them is not
    negative.

    Args:
        features: (n, C).
        ranked: patches (n,), the seed first.
        k: number of candidates.

    Returns:
        (n,) bool, True for the seed.
    """
    seed, candidates = ranked[0], ranked[:k]
    support = candidates[features[candidates] @ features[seed] >= 0]
    belongs = features @ features[support].sum(0) >= 0
    belongs[seed] = True  # a sum of values of 0 or more, which rounding may make negative
    return belongs


def component(mask: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    """The connected component of a mask (h, w) with the seed; patches are connected by shared sides."""
    start = np.zeros(mask.shape, dtype=bool)
    start[seed] = True
    return np.asarray(binary_propagation(start, mask=mask), dtype=bool)
