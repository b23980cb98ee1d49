# The names of this package and where each is defined: read by type checkers, and by lazy_loader on first use.
from .evaluate import Trained, by_protocol, linear_segmentation, segmentation
from .protocol import PAPER, QUICK, RELEASED, Protocol, SegmentationOptions

__all__ = [
    "PAPER",
    "QUICK",
    "RELEASED",
    "Protocol",
    "SegmentationOptions",
    "Trained",
    "by_protocol",
    "linear_segmentation",
    "segmentation",
]
