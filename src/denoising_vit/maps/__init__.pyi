# The names of this room and where each is defined: read by type checkers, and by lazy_loader on first use.
from .clusters import Clusters, cluster_maps
from .colouring import Colouring
from .components import Component
from .foreground import Foreground, ForegroundPCA
from .norms import NormScale, norm_maps
from .palette import Palette
from .palette_files import read_palette, write_palette
from .panel import draw_panel
from .pca import PCABasis
from .rows import draw_rows
from .similarity import similarity_maps
from .titles import TITLES

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
