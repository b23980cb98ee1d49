# The names of this package and where each is defined: read by type checkers, and by lazy_loader on first use.
from .davis import ClipData, Frame, open_clips
from .keypoint_matching import Matched, MatchingOptions, match, matching
from .label_propagation import Propagated, PropagationOptions, propagate, propagation
from .pairs import KeypointPair, PairData, PairedPhoto, PairSet, open_correspondence, open_pairs

__all__ = [
    "ClipData",
    "Frame",
    "KeypointPair",
    "Matched",
    "MatchingOptions",
    "PairData",
    "PairSet",
    "PairedPhoto",
    "Propagated",
    "PropagationOptions",
    "match",
    "matching",
    "open_clips",
    "open_correspondence",
    "open_pairs",
    "propagate",
    "propagation",
]
