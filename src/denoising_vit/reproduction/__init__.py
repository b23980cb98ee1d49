"""Reproducing published rows: what each takes, what is missing for it, and the run itself."""

from denoising_vit.reproduction.denoising import DenoiserRecipe
from denoising_vit.reproduction.distilling import DistilledRecipe
from denoising_vit.reproduction.rows import Row, Status, Step, find_row, list_rows
from denoising_vit.reproduction.running import Protocols, reproduce_row

__all__ = [
    "DenoiserRecipe",
    "DistilledRecipe",
    "Protocols",
    "Row",
    "Status",
    "Step",
    "find_row",
    "list_rows",
    "reproduce_row",
]
