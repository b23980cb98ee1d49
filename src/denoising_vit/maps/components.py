"""One principal component as shades of one scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from denoising_vit.maps.colouring import lookup
from denoising_vit.maps.pca import Features, PCABasis

COMPONENT_COLOURS = "viridis"


@dataclass(frozen=True, eq=False)
class Component:
    """The component of a basis with this index, from dark to bright over the basis's range.

    Attributes:
        basis: shared by all components and maps.
        index: 0 to 2, strongest first.
    """

    basis: PCABasis
    index: int

    def colours(self, features: Features) -> np.ndarray:
        """The component of features (h, w, C) as a picture (h, w, 3) uint8.

        Raises:
            ValueError: if the shape is not (h, w, C) with the basis's C, or values are not finite.
        """
        return lookup(self.basis.shares(features)[..., self.index], COMPONENT_COLOURS)
