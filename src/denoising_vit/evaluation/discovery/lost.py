"""LOST: one object of an image, found from the features of its patches alone.

Siméoni et al., "Localizing Objects with Self-Supervised Transformers and no Labels" (BMVC 2021): patches of an object
are alike and unlike most others, so that an object holds the patch with the fewest similar ones, the seed. They took
the keys of the last attention layer; here any features are taken as they are. Where their code asks for sums above 0
and the paper for 0 or more, this is as the paper.

Ranking by norm is for features whose norm tells objects, as "Denoising Vision Transformers" (Yang et al. 2024, section
5.2 and supplement B) says of denoised ones: "we find that the feature norm is a good candidate". It says no more than
that, and its code has no object discovery. Our reading: norms take the place of degrees in the choice of the seed and
of the candidates, and nothing else changes.
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

#: Similarities (patches times patches) that are held at a time.
_AT_ONCE = 2**24


@dataclass(frozen=True, eq=False)
class Discovered:
    """One object.

    Attributes:
        seed: row and column of the patch that it was found by.
        mask: (h, w) bool, the patches that it has.
        box: the smallest one around them, in patches.
    """

    seed: tuple[int, int]
    mask: np.ndarray
    box: CellBox


def find_object(features: Tensor, seed_by: SeedBy = "degree", k: int = 100, *, centred: bool = False) -> Discovered:
    """Finds one object by LOST.

    Args:
        features: of the patches of an image, (h, w, C).
        seed_by: what ranks patches; the first is the seed.
        k: first patches of the ranking that may help the seed; all of them where there are fewer.
        centred: whether the image's mean feature is taken away first. Patches count as similar where their inner
            product is not negative, which says something only of features around zero: those with a large part in
            common are all similar, and the whole image is the object.

    Raises:
        EvaluationError: if features are no grid, or not finite.
    """
    if features.ndim != 3 or 0 in features.shape or not torch.isfinite(features).all():
        raise EvaluationError(f"expected finite features of patches (h, w, C), got {tuple(features.shape)}")
    grid = (features.shape[0], features.shape[1])
    # In double precision: signs decide everything, and float16 numbers are multiplied and added up nearly exactly.
    flat = features.flatten(0, 1).double()
    if centred:
        flat = flat - flat.mean(0)
    ranked = ranking(flat, seed_by)
    seed = divmod(int(ranked[0]), grid[1])
    mask = component(expanded(flat, ranked, k).reshape(grid).cpu().numpy(), seed)
    return Discovered(seed, mask, box_around(mask))


def degrees(features: Tensor) -> Tensor:
    """How many patches are similar to each, (n,) int64, itself among them: features (n, C)."""
    parts = features.split(max(_AT_ONCE // len(features), 1))
    return torch.cat([(part @ features.T >= 0).sum(1) for part in parts])


def ranking(features: Tensor, by: SeedBy) -> Tensor:
    """Patches (n,) by their degree, lowest first, or by their norm, largest first: features (n, C).

    Of equals the first comes first.
    """
    if by == "degree":
        return degrees(features).argsort(stable=True)
    return features.norm(dim=1).argsort(stable=True, descending=True)


def expanded(features: Tensor, ranked: Tensor, k: int) -> Tensor:
    """Patches that belong to the seed's object, connected with it or not.

    Those of the first k that are similar to the seed speak for the object; a patch q belongs to it where the sum of
    f_q · f_s over them is not negative.

    Args:
        features: (n, C).
        ranked: patches (n,), the seed first.
        k: how many may speak.

    Returns:
        (n,) bool; the seed belongs.
    """
    seed, candidates = ranked[0], ranked[:k]
    speakers = candidates[features[candidates] @ features[seed] >= 0]
    belongs = features @ features[speakers].sum(0) >= 0
    belongs[seed] = True  # a sum of numbers that are 0 or more, which rounding may still bring below 0
    return belongs


def component(mask: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    """The patches of a mask (h, w) that are connected with the seed by shared sides."""
    start = np.zeros(mask.shape, dtype=bool)
    start[seed] = True
    return np.asarray(binary_propagation(start, mask=mask), dtype=bool)
