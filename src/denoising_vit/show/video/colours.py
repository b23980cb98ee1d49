"""Colours of a clip: settled once, on frames from all over it, for all its frames and features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from denoising_vit.backbones import Backbone
from denoising_vit.maps import Palette, read_palette, write_palette

#: Vectors that settle the colours of a clip.
_ENOUGH = 8192

#: Which fields of a palette panels take their colours from.
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "pca": ("basis",),
    "first": ("basis",),
    "second": ("basis",),
    "third": ("basis",),
    "kmeans": ("clusters",),
    "norm": ("norms",),
    "foreground": ("foreground",),
    "foreground-pca": ("foreground", "foreground_basis"),
}


class ClipColours:
    """What colours the maps of one clip.

    Args:
        clip: fitted on frames of the clip.
        data_set: of a data set; it colours dataset-pca, and foreground where it is given.
    """

    def __init__(self, clip: Palette, data_set: Palette | None) -> None:
        self._clip, self._data_set = clip, data_set

    @classmethod
    def fit(cls, maps: Sequence[Tensor], data_set: Palette | None) -> ClipColours:
        """The colours of all these maps (h, w, C) together, of evenly spread rows and columns where they are many."""
        return cls(Palette(maps, most=_ENOUGH), data_set)

    @classmethod
    def load(cls, path: Path, data_set: Palette | None) -> ClipColours:
        """What :meth:`save` wrote.

        Raises:
            FormatError: if it is not that.
        """
        return cls(read_palette(path), data_set)

    def save(self, path: Path, panels: Sequence[str]) -> None:
        """Keeps the colours of the clip in these panels alone, so that a run that goes on has the same."""
        write_palette(self._clip, path, {field for panel in panels for field in _FIELDS.get(panel, ())})

    def picture(self, panel: str, features: Tensor) -> np.ndarray:
        """Features (h, w, C) as (h, w, 3) uint8."""
        if panel == "dataset-pca":
            assert self._data_set is not None  # the options have been checked
            return self._data_set.colours("pca", features)
        palette = self._data_set if panel == "foreground" and self._data_set is not None else self._clip
        return palette.colours(panel, features)


def data_set_palette(path: str | None, backbone: Backbone) -> Palette | None:
    """The saved palette of a data set, if one is given.

    Raises:
        FormatError: if it is none, or that of another backbone.
    """
    return None if path is None else read_palette(path, backbone)
