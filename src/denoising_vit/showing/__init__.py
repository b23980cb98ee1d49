"""Looking at features: maps of a photo's features, side by side in the same colours, on one sheet."""

from denoising_vit.showing.drawing import draw_sheet
from denoising_vit.showing.gathering import Gatherer, ShownPhoto
from denoising_vit.showing.options import MAPS, ShowOptions

__all__ = ["MAPS", "Gatherer", "ShowOptions", "ShownPhoto", "draw_sheet"]
