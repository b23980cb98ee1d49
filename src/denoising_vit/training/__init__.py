"""Training: stage 2, the one-pass denoiser."""

from denoising_vit.training.job import Photos, Stored, TrainJob
from denoising_vit.training.options import PairOptions, TrainOptions

__all__ = ["PairOptions", "Photos", "Stored", "TrainJob", "TrainOptions"]
