"""Figures that were published for the method, as data, to be put beside measured ones."""

from denoising_vit.denoiser.published.figures import (
    DISCOVERY,
    FIGURES,
    VARIANTS,
    DiscoveryRow,
    PublishedRow,
    published_discovery,
    published_row,
    published_rows,
)

__all__ = [
    "DISCOVERY",
    "FIGURES",
    "VARIANTS",
    "DiscoveryRow",
    "PublishedRow",
    "published_discovery",
    "published_row",
    "published_rows",
]
