"""Palette: the colours that everything in one comparison shares, from one photo, a film, or a whole data set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from denoising_vit.maps.clusters import Clusters
from denoising_vit.maps.colouring import Colouring
from denoising_vit.maps.components import Component
from denoising_vit.maps.foreground import Foreground, ForegroundPCA
from denoising_vit.maps.norms import NormScale
from denoising_vit.maps.pca import Features, PCABasis, to_arrays

#: Vectors that a palette of many maps is fitted on.
ENOUGH = 131_072


class Palette:
    """The colourings that one comparison shares, each fitted when it is first asked for.

    Args:
        maps: features (h, w, C) that are compared; all of them together decide every colour.
        fitted: colourings that are known already, by their field here: ``basis``, ``clusters``, ``norms``,
            ``foreground``, ``foreground_basis``.
        backbone: the backbone as it is recorded with results, where that is known.
        most: vectors that it is fitted on, about; of more, evenly spread rows and columns are taken.

    Raises:
        ValueError: if there are neither maps nor colourings, a map is not (h, w, C), channels differ, or values are not
            finite.
    """

    def __init__(
        self,
        maps: Sequence[Features],
        *,
        fitted: Mapping[str, Any] | None = None,
        backbone: dict[str, Any] | None = None,
        most: int = ENOUGH,
    ) -> None:
        self.backbone = backbone
        self._maps = [] if not maps and fitted else _thinned(to_arrays(*maps, maps=True), most)
        vars(self).update(fitted or {})  # takes the place of what would be fitted

    @classmethod
    def fit(cls, maps: Sequence[Features], *, backbone: dict[str, Any] | None = None) -> Palette:
        """The palette of these maps (h, w, C), all counting alike by their vectors."""
        return cls(maps, backbone=backbone)

    @functools.cached_property
    def basis(self) -> PCABasis:
        """Of the PCA and of single components."""
        return PCABasis.fit(*self._maps)

    @functools.cached_property
    def clusters(self) -> Clusters:
        """Of k-means."""
        return Clusters.fit(*self._maps)

    @functools.cached_property
    def norms(self) -> NormScale:
        """Of lengths."""
        return NormScale.fit(*self._maps)

    @functools.cached_property
    def foreground(self) -> Foreground:
        """What is foreground."""
        return Foreground.fit(*self._maps)

    @functools.cached_property
    def foreground_basis(self) -> PCABasis:
        """Of the foreground's own PCA."""
        return ForegroundPCA.fit(*self._maps, foreground=self.foreground).basis

    def __getitem__(self, kind: str) -> Colouring:
        """The colouring of a kind of map.

        Raises:
            ValueError: if there is no such kind.
        """
        makers: dict[str, Callable[[], Colouring]] = {
            "pca": lambda: self.basis,
            "kmeans": lambda: self.clusters,
            "norm": lambda: self.norms,
            "first": lambda: Component(self.basis, 0),
            "second": lambda: Component(self.basis, 1),
            "third": lambda: Component(self.basis, 2),
            "foreground-pca": lambda: ForegroundPCA(self.foreground, self.foreground_basis),
            "foreground": lambda: self.foreground,
        }
        if kind not in makers:
            raise ValueError(f"no kind of map named {kind!r}; there are {', '.join(makers)}")
        return makers[kind]()

    def colours(self, kind: str, features: Features) -> np.ndarray:
        """Features (h, w, C) as a picture (h, w, 3) uint8 of a kind of :data:`TITLES`.

        Raises:
            ValueError: if there is no such kind, the shape is not (h, w, C) with this C, or values are not finite.
        """
        return self[kind].colours(features)


def _thinned(arrays: list[np.ndarray], most: int) -> list[np.ndarray]:
    """The maps themselves where they are few, else every so many rows and columns of each, borders kept."""
    share = min(1.0, (most / sum(array.shape[0] * array.shape[1] for array in arrays)) ** 0.5)
    return arrays if share == 1 else [thin(array, share) for array in arrays]


def thin(array: np.ndarray, share: float) -> np.ndarray:
    """A share of the rows and of the columns of a map (h, w, C), evenly spread, the first and the last among them."""
    rows, columns = (
        np.unique(np.rint(np.linspace(0, side - 1, max(2, round(side * share)))).astype(int))
        for side in array.shape[:2]
    )
    return array[rows][:, columns]
