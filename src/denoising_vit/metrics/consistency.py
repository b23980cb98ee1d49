"""Cross-view consistency: whether features say the same of a place, whichever view it is seen in."""

from __future__ import annotations

from torch import Tensor

from denoising_vit.decomposition.heldout import Agreement
from denoising_vit.errors import EvaluationError


def consistency(expected: Tensor, features: Tensor) -> float:
    """R^2 between features of the same places in two views: 1 - squared difference / variance of the second.

    What depends on the place in the view, and what depends on the rest of the view, both lower it. It is no criterion
    alone: a blurred map, whose differences between places are gone, agrees with itself better than a sharp one, and a
    map of position in the *image* agrees perfectly.

    Args:
        expected: features as the first view has them, sampled at the places of the second view's patches,
            (N, h, w, C).
        features: the second view's own, (N, h, w, C).

    Returns:
        At most 1; 0 where the first view says no more than the mean feature, negative where it says less.

    Raises:
        EvaluationError: if shapes differ, or the features do not vary.
    """
    if expected.shape != features.shape:
        raise EvaluationError(f"expected the same shapes, got {tuple(expected.shape)} and {tuple(features.shape)}")
    agreement = Agreement()
    for truth, predicted in zip(features.double(), expected.double(), strict=True):
        agreement.add(truth, predicted)
    if agreement.r2 is None:
        raise EvaluationError("constant output: all tokens of the features are the same, so nothing can be consistent")
    return agreement.r2
