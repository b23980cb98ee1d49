"""Correspondence: labels carried through videos (DAVIS), and keypoints found in other photos (SPair-71k)."""

from denoising_vit.evaluation.correspondence.clips import ClipData, Frame, open_clips
from denoising_vit.evaluation.correspondence.comparing import matching, propagation
from denoising_vit.evaluation.correspondence.matched import Matched, match
from denoising_vit.evaluation.correspondence.opening import open_correspondence
from denoising_vit.evaluation.correspondence.options import MatchingOptions, PropagationOptions
from denoising_vit.evaluation.correspondence.pair import KeypointPair
from denoising_vit.evaluation.correspondence.pairs import PairData, PairedPhoto, PairSet, open_pairs
from denoising_vit.evaluation.correspondence.propagated import Propagated, propagate

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
