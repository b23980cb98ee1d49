# The names of this package and where each is defined: read by type checkers, and by lazy_loader on first use.
from .clusters import Clusters
from .colours import Foreground, NormScale, PCABasis, similarity_maps
from .kinds import TITLES
from .palette import Palette, read_palette, write_palette
from .panel import draw_panel
from .sheet import draw_rows

__all__ = [
    "TITLES",
    "Clusters",
    "Foreground",
    "NormScale",
    "PCABasis",
    "Palette",
    "draw_panel",
    "draw_rows",
    "read_palette",
    "similarity_maps",
    "write_palette",
]
