"""Reproduction of published rows: required data, what is missing, and the runs."""

from denoising_vit.reproduction.rows import Row, Status, Step, find_row, list_rows
from denoising_vit.reproduction.running import DenoiserRecipe, DistilledRecipe, Protocols, reproduce_row

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
