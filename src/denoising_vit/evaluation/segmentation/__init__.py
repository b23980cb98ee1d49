"""Linear segmentation: a probe of batch norm and a 1 x 1 convolution, by the published protocol or a quick one."""

from denoising_vit.evaluation.segmentation.protocol import PAPER, QUICK, RELEASED, Protocol, SegmentationOptions
from denoising_vit.evaluation.segmentation.training import Trained, linear_segmentation

__all__ = ["PAPER", "QUICK", "RELEASED", "Protocol", "SegmentationOptions", "Trained", "linear_segmentation"]
