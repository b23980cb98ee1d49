"""Stage 3: the ViT itself learns to give clean features, and needs no extra block."""

from denoising_vit.distilled.job import DistillJob
from denoising_vit.distilled.options import DistillOptions

__all__ = ["DistillJob", "DistillOptions"]
