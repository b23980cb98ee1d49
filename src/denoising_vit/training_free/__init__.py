"""Cleaning without training: project out positional directions, average shifted passes, test-time registers."""

from denoising_vit.training_free.average import AveragedViT
from denoising_vit.training_free.project import Subspace, find_subspace
from denoising_vit.training_free.registers import Registers, find_registers, with_registers

__all__ = ["AveragedViT", "Registers", "Subspace", "find_registers", "find_subspace", "with_registers"]
