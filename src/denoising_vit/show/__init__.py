"""Looking at features: maps of a photo's features, side by side in the same colours, on one sheet."""

from denoising_vit.show.drawing import draw_sheet
from denoising_vit.show.gathering import Gatherer, ShownPhoto
from denoising_vit.show.options import MAPS, ShowOptions

__all__ = ["MAPS", "Gatherer", "ShowOptions", "ShownPhoto", "draw_sheet"]
