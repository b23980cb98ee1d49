"""Figures that were published for the method, as data, to be put beside measured ones."""

from denoising_vit.published.figures import FIGURES, VARIANTS, PublishedRow, published_row, published_rows

__all__ = ["FIGURES", "VARIANTS", "PublishedRow", "published_row", "published_rows"]
