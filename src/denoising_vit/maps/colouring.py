"""What every kind of picture is: a way to colour features that is settled once, for all that are compared."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from matplotlib import colormaps

from denoising_vit.maps.pca import Features


class Colouring(Protocol):
    """How features become colours. Two maps coloured by one colouring can be compared colour by colour."""

    def colours(self, features: Features) -> np.ndarray:
        """The features (h, w, C) as a picture (h, w, 3) uint8.

        Raises:
            ValueError: if the shape is not (h, w, C) with the C it was fitted on, or values are not finite.
        """
        ...


def lookup(shares: np.ndarray, name: str) -> np.ndarray:
    """Values (h, w) as colours (h, w, 3) uint8 of the named colormap: 0 its first colour, 1 its last; clipped."""
    return np.asarray(colormaps[name](np.clip(shares, 0, 1), bytes=True))[..., :3]
