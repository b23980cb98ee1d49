"""Depth: a linear probe by the published protocol or a quick one, judged as NYUv2 is."""

from denoising_vit.evaluation.depth.data import DepthData, open_depth
from denoising_vit.evaluation.depth.images import DepthImage
from denoising_vit.evaluation.depth.judging import Depths, depth_errors
from denoising_vit.evaluation.depth.linear import LinearDepth, by_protocol, depth
from denoising_vit.evaluation.depth.protocol import PAPER, QUICK, RELEASED, DepthOptions, DepthProtocol

__all__ = [
    "PAPER",
    "QUICK",
    "RELEASED",
    "DepthData",
    "DepthImage",
    "DepthOptions",
    "DepthProtocol",
    "Depths",
    "LinearDepth",
    "by_protocol",
    "depth",
    "depth_errors",
    "open_depth",
]
