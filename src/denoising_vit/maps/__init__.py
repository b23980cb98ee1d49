"""Pictures of features: PCA, k-means, norm, similarity and more, each in colours that everything compared shares.

One basis, one range, one set of clusters: two maps that look alike are alike, and a difference of colour is a
difference of features.
"""

from __future__ import annotations

from denoising_vit.maps.clusters import Clusters, cluster_maps
from denoising_vit.maps.colouring import Colouring
from denoising_vit.maps.components import Component
from denoising_vit.maps.foreground import Foreground, ForegroundPCA
from denoising_vit.maps.norms import NormScale, norm_maps
from denoising_vit.maps.palette import TITLES, Palette
from denoising_vit.maps.palette_files import read_palette, write_palette
from denoising_vit.maps.panel import draw_panel
from denoising_vit.maps.pca import PCABasis
from denoising_vit.maps.rows import draw_rows
from denoising_vit.maps.similarity import similarity_maps

__all__ = [
    "TITLES",
    "Clusters",
    "Colouring",
    "Component",
    "Foreground",
    "ForegroundPCA",
    "NormScale",
    "PCABasis",
    "Palette",
    "cluster_maps",
    "draw_panel",
    "draw_rows",
    "norm_maps",
    "read_palette",
    "similarity_maps",
    "write_palette",
]
