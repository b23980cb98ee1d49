# The names of this room and where each is defined: read by type checkers, and by lazy_loader on first use.
from .data import DepthData, open_depth
from .images import DepthImage
from .judging import Depths, depth_errors
from .linear import LinearDepth, by_protocol, depth
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
