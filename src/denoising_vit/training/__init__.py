"""Training: stage 2, the one-pass denoiser, and stage 3, the distilled ViT."""

from denoising_vit.denoiser.job import Photos, Stored, TrainJob
from denoising_vit.distilled import DistillJob, DistillOptions
from denoising_vit.training.options import PairOptions, TrainOptions, ViewOptions

__all__ = [
    "DistillJob",
    "DistillOptions",
    "PairOptions",
    "Photos",
    "Stored",
    "TrainJob",
    "TrainOptions",
    "ViewOptions",
]
