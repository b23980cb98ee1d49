"""Data that correspondence is judged on, whichever task it is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from denoising_vit.evaluation.correspondence.clips import ClipData, open_clips
from denoising_vit.evaluation.correspondence.folders import DAVIS, KEYPOINTS, SPAIR, locate
from denoising_vit.evaluation.correspondence.pairs import PairData, open_pairs


def open_correspondence(
    path: str | Path,
    *,
    sequences: int = 0,
    split: str = "test",
    pairs: int = 0,
    progress: Callable[[], None] | None = None,
) -> ClipData | PairData:
    """Opens videos in the layout of DAVIS, pairs in that of SPair-71k, or a folder of keypoints.

    Args:
        path: the folder.
        sequences: of videos: at most so many, spread evenly; 0 takes all.
        split: of pairs: ``trn``, ``val`` or ``test``.
        pairs: at most so many, spread evenly; 0 takes all.
        progress: called after each frame or photo.

    Raises:
        EvaluationError: if the folder holds none of them, or nothing usable.
    """
    arrangement, _ = locate(Path(path), [SPAIR, DAVIS, KEYPOINTS])  # the more particular one first
    if arrangement is DAVIS:
        return open_clips(path, progress=progress, sequences=sequences)
    return open_pairs(path, split=split, pairs=pairs, progress=progress)
