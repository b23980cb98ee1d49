"""Stage 3: the ViT itself learns to give clean features, and needs no extra block."""

from denoising_vit.training.distillation.job import DistillJob
from denoising_vit.training.distillation.options import DistillOptions

__all__ = ["DistillJob", "DistillOptions"]
