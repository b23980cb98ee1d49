"""Dependence of an artifact on the calibration photos, and the number of photos needed.

Each photo estimates the same G with an independent error: ``G_i = G + e_i``. The products ``G_i . G_j`` are sufficient:
they average |G|^2 for different photos, and |G|^2 + |e|^2 for a photo with itself.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

#: Target reliability of the suggested number of photos.
ENOUGH = 0.95

#: Fraction of the features' energy below which a common part does not count as an artifact.
NEGLIGIBLE = 0.001

#: Number of random splits to average a correlation over.
_SPLITS = 64


@dataclass(frozen=True)
class Stability:
    """Reliability of the mean of single photos' artifacts.

    Attributes:
        photos: number of photos.
        signal: mean square of the common part, summed over channels: |G|^2 per patch; can be slightly negative if there
            is no common part.
        noise: mean square of the individual errors, in the same units.
        split_half: correlation between the means of two halves of the photos, averaged over random splits.
        energy: variance of the features, in the same units; None if unknown.
    """

    photos: int
    signal: float
    noise: float
    split_half: float
    energy: float | None = None

    @classmethod
    def of(cls, products: np.ndarray, seed: int = 0, energy: float | None = None) -> Stability:
        """Compute from the products (N, N) of N photos' artifacts, per patch; N >= 4."""
        photos = len(products)
        own = float(np.trace(products)) / photos
        common = (float(products.sum()) - float(np.trace(products))) / (photos * (photos - 1))
        return cls(photos, common, max(own - common, 0.0), split_half(products, photos, seed), energy)

    def reliability_of(self, photos: int) -> float:
        """Fraction of the variance of the mean artifact of this number of photos that is G, in [0, 1]."""
        signal = max(self.signal, 0.0)
        total = signal + self.noise / photos
        return signal / total if total > 0 else 0.0

    @property
    def reliability(self) -> float:
        """Fraction of the artifact's variance that is G, in [0, 1]."""
        return self.reliability_of(self.photos)

    @property
    def share(self) -> float | None:
        """The common part relative to the features' energy; None if that is unknown."""
        if self.energy is None:
            return None
        return max(self.signal, 0.0) / self.energy if self.energy > 0 else 0.0

    @property
    def suggested(self) -> int | None:
        """Number of photos for a reliability of 0.95; None if the photos have nothing in common."""
        if self.signal <= 0 or (self.share is not None and self.share < NEGLIGIBLE):
            return None
        return max(math.ceil(ENOUGH / (1 - ENOUGH) * self.noise / self.signal - 1e-9), 4)

    def record(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return asdict(self) | {
            "share": self.share,
            "reliability": self.reliability,
            "suggested": self.suggested,
        }


def split_half(products: np.ndarray, photos: int, seed: int = 0) -> float:
    """Mean correlation between the means of two disjoint halves of ``photos`` of the N photos, over random draws.

    Artifacts have mean zero in every channel, so their correlation over all positions and channels is a cosine.
    """
    chance = np.random.RandomState(seed)
    half = photos // 2
    found = []
    for _ in range(_SPLITS):
        drawn = chance.permutation(len(products))
        first, second = drawn[:half], drawn[half : 2 * half]
        across = products[np.ix_(first, second)].sum()
        within = products[np.ix_(first, first)].sum() * products[np.ix_(second, second)].sum()
        found.append(across / math.sqrt(within) if within > 0 else 0.0)
    return float(np.mean(found))


def curve(products: np.ndarray, seed: int = 0) -> dict[int, float]:
    """Split-half correlation by number of photos: 4, 8, 16, ... and all."""
    counts = [2**k for k in range(2, int(math.log2(len(products))) + 1)]
    if counts[-1] != len(products):
        counts.append(len(products))
    return {count: split_half(products, count, seed) for count in counts}
