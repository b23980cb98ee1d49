"""Stage 1: separating the features of many views of one image into semantic field, shared artifact and residual."""

from denoising_vit.decomposition.exact import ExactSolver
from denoising_vit.decomposition.result import Decomposition
from denoising_vit.decomposition.statistics import Statistics

__all__ = ["Decomposition", "ExactSolver", "Statistics"]
