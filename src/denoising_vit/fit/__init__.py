"""Stage 1 over a whole data set, into a feature store: resumable, on one machine or a Ray cluster."""

from denoising_vit.fit.estimate import Estimate
from denoising_vit.fit.job import FitJob
from denoising_vit.fit.options import FitOptions

__all__ = ["Estimate", "FitJob", "FitOptions"]
