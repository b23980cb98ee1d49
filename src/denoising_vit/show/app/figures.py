"""Figures of one answer that need no labels, each with a sentence about what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from denoising_vit.errors import EvaluationError
from denoising_vit.metrics.tokens import effective_rank, neighbour_similarity, outlier_share
from denoising_vit.show.app.answering import Answer

#: Stands for what cannot be computed.
NONE = "–"


#: Figures of either side: name, measure, how it is written, what it says.
_OF_BOTH: tuple[tuple[str, Callable[[Tensor], float], str, str], ...] = (
    (
        "outlier tokens",
        lambda features: outlier_share(features).total,
        ".1%",
        "Share of patches whose feature vector is much longer or shorter than the others'.",
    ),
    (
        "similarity of neighbours",
        neighbour_similarity,
        ".3f",
        "Mean cosine of adjacent patches. Noise lowers it and blur raises it: neither end is good by itself.",
    ),
    (
        "effective rank",
        effective_rank,
        ".0f",
        "How many directions the features use. A great loss would mean that content was lost.",
    ),
)


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        name: what is measured.
        raw: of raw features, as text; None where it is a figure of both.
        clean: of denoised features, or of both, as text.
        words: what it says.
    """

    name: str
    raw: str | None
    clean: str
    words: str


def figures(found: Answer) -> list[Figure]:
    """What one photo can tell; how well features tell the place it cannot, as content and place are one in it."""
    result = found.result
    raw, clean = result.raw[None], result.semantic[None]  # (1, h, w, C)
    kept = torch.nn.functional.cosine_similarity(result.raw, result.semantic, dim=-1)
    changed = Figure(
        "cosine of raw and denoised",
        None,
        f"{float(kept.mean()):.3f}",
        "Mean over patches; 1 would mean that nothing was changed.",
    )
    both = [
        Figure(name, _told(measure, raw, form), _told(measure, clean, form), words)
        for name, measure, form, words in _OF_BOTH
    ]
    return [*_heldout(found), changed, *both, _times(found)]


def _heldout(found: Answer) -> list[Figure]:
    """How well stage 1 predicts views that it has not seen; only exact knows."""
    r2, cosine = found.result.heldout_r2, found.result.heldout_cosine
    if r2 is None or cosine is None:
        return []
    return [
        Figure("held-out R²", None, f"{r2:.3f}", "Share of the variance of crops not fitted that is predicted."),
        Figure("held-out cosine", None, f"{cosine:.3f}", "Mean cosine to the features of these crops."),
    ]


def _times(found: Answer) -> Figure:
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.seconds.items())
    return Figure("time", None, f"{sum(found.seconds.values()):.2f} s", f"{parts}; drawing comes on top.")


def _told(measure: Callable[[Tensor], float], features: Tensor, form: str) -> str:
    try:
        return format(measure(features), form)
    except EvaluationError:  # all features are the same, as of a backbone that sees nothing
        return NONE
