"""The patch grid: valid image sides, numbers of patches, and patch centres."""

from __future__ import annotations

import numpy as np

from denoising_vit.errors import SizeError


def patch_count(side: int, patch: int, stride: int) -> int:
    """Number of whole patches along one side; less than 1 if the side is shorter than a patch.

    There are no checks, so that it also works in graphs with a symbolic ``side``.
    """
    return (side - patch) // stride + 1


def patch_centres(side: int, patch: int, stride: int) -> np.ndarray:
    """Centres of the patches along one side, relative to that side: ``(k stride + patch / 2) / side``, shape (n,).

    This equals ``(k + 0.5) / n`` only if the stride is the patch size. The published code places patches edge to
    edge instead, which is up to half a patch off.
    """
    return (np.arange(patch_count(side, patch, stride)) * stride + patch / 2) / side


def nearest_sizes(side: int, patch: int, stride: int) -> tuple[int, ...]:
    """The sides nearest to ``side`` that fit the patch grid: itself, or the next below and above; at least a patch."""
    if side < patch:
        return (patch,)
    below = patch + (patch_count(side, patch, stride) - 1) * stride
    return (below,) if below == side else (below, below + stride)


def check_side(side: int, patch: int, stride: int) -> None:
    """Check that whole patches cover a side, ``patch + k stride``.

    Raises:
        SizeError: if they do not; the message names the nearest valid sides.
    """
    fitting = nearest_sizes(side, patch, stride)
    if side not in fitting:
        rule = f"a multiple of {patch}" if patch == stride else f"{patch} + k * {stride}"
        raise SizeError(
            f"a side of {side} pixels does not fit the patch grid: expected {rule} pixels (patch {patch}, stride "
            f"{stride}). Nearest: {' or '.join(map(str, fitting))}"
        )
