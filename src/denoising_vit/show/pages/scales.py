"""The colours of lengths, from the least to the greatest, for the scales of pages."""

from __future__ import annotations

import functools

import numpy as np

from denoising_vit.maps.colouring import lookup
from denoising_vit.maps.norms import NORM_COLOURS
from denoising_vit.show.pages.rendering import png_uri


@functools.cache
def scale_colours(name: str = NORM_COLOURS) -> str:
    """A colour bar of a pixel's height, as a data URI."""
    return png_uri(lookup(np.linspace(0, 1, 128)[None], name))
