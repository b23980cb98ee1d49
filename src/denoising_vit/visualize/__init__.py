"""Pictures of features: PCA in one shared basis, norm, k-means, similarity, and a panel of all of them.

Everything that is compared is coloured together: one basis, one range, one set of clusters. Two maps that look alike
are alike, and a difference of colour is a difference of features.
"""

from __future__ import annotations

from denoising_vit.visualize.maps import cluster_maps, norm_maps, similarity_maps
from denoising_vit.visualize.panel import draw_panel
from denoising_vit.visualize.pca import PCABasis
from denoising_vit.visualize.rows import draw_rows

__all__ = ["PCABasis", "cluster_maps", "draw_panel", "draw_rows", "norm_maps", "similarity_maps"]
