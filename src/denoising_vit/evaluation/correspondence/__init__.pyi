# The names of this room and where each is defined: read by type checkers, and by lazy_loader on first use.
from .clips import ClipData, Frame, open_clips
from .comparing import matching, propagation
from .matched import Matched, match
from .opening import open_correspondence
from .options import MatchingOptions, PropagationOptions
from .pair import KeypointPair
from .pairs import PairData, PairedPhoto, PairSet, open_pairs
from .propagated import Propagated, propagate

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
