"""The colours of lengths, from the least to the greatest, for the scales of pages."""

from __future__ import annotations

import functools

import numpy as np

from denoising_vit.pages.rendering import png_uri
from denoising_vit.visualize.colouring import lookup
from denoising_vit.visualize.norms import NORM_COLOURS


@functools.cache
def scale_colours(name: str = NORM_COLOURS) -> str:
    """A colour bar of a pixel's height, as a data URI."""
    return png_uri(lookup(np.linspace(0, 1, 128)[None], name))
