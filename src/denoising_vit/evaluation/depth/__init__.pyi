# The names of this package and where each is defined: read by type checkers, and by lazy_loader on first use.
from .data import DepthData, DepthImage, open_depth
from .evaluate import Depths, LinearDepth, by_protocol, depth, depth_errors
from .protocol import PAPER, QUICK, RELEASED, DepthOptions, DepthProtocol

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
