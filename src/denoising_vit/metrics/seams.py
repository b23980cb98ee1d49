"""Seams: size of steps between neighbouring patches across tile borders, relative to those elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from denoising_vit.errors import EvaluationError


def seam_ratio(features: Tensor, rows: Sequence[int], columns: Sequence[int]) -> float:
    """Mean norm of steps between neighbouring patches across tile borders, over that of all other steps.

    Args:
        features: (h, w, C).
        rows: every row k with a tile border between rows k and k + 1.
        columns: every column k with a tile border between columns k and k + 1.

    Returns:
        1 without seams, unless the content has edges exactly there; above 1 with seams.

    Raises:
        EvaluationError: if there is no border, or no step elsewhere.
    """
    across, within = [], []
    for dim, borders in ((0, rows), (1, columns)):
        steps = features.diff(dim=dim).norm(dim=-1).movedim(dim, 0)  # (h - 1, w) or (w - 1, h)
        border = torch.zeros(len(steps), dtype=torch.bool)
        border[list(borders)] = True
        across.append(steps[border].flatten())
        within.append(steps[~border].flatten())
    there, elsewhere = torch.cat(across), torch.cat(within)
    if not len(there) or not float(elsewhere.sum()):
        raise EvaluationError("expected at least one tile border, and features that differ between patches elsewhere")
    return float(there.mean() / elsewhere.mean())
