"""Stage 1 as published: F as a hash grid with a small network, G as a table, h as a network, fitted by Adam."""

from denoising_vit.decomposition.neural_field.fit import Evaluation, NeuralFit, SeenViews, fit_neural_field
from denoising_vit.decomposition.neural_field.hash_grid import HashGrid
from denoising_vit.decomposition.neural_field.options import NeuralFieldOptions

__all__ = ["Evaluation", "HashGrid", "NeuralFieldOptions", "NeuralFit", "SeenViews", "fit_neural_field"]
