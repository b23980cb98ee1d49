"""Labels carried from frame to frame by the similarity of patches, as published for DINO.

Caron et al., ICCV 2021, section 4.2.2, after Jabri et al., NeurIPS 2020: nothing is trained. Each patch takes the
labels of the most similar patches of the first frame and of the last few ones, near its own place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from denoising_vit.evaluation.correspondence.options import PropagationOptions
from denoising_vit.evaluation.patches import at_places
from denoising_vit.views.crops import Crop
from denoising_vit.views.patch_grid import patch_centres


@dataclass(frozen=True, eq=False)
class Held:
    """One frame of the context.

    Attributes:
        features: (h, w, C), of length 1 each.
        labels: (h, w, K), how much each patch belongs to each label, in [0, 1].
    """

    features: Tensor
    labels: Tensor


def carry(features: Iterable[Tensor], first: Tensor, options: PropagationOptions) -> Iterator[Tensor]:
    """Carries the labels of the first frame through a clip; only the context is held.

    What is handed on are the labels as they were found, not made to fill [0, 1].

    Args:
        features: (h, w, C) of each frame in turn, the first one included.
        first: labels (h, w, K) of the first frame.
        options: context, k, radius and temperature.

    Yields:
        Labels (h, w, K) in [0, 1] of each frame after the first.
    """
    recent: deque[Held] = deque(maxlen=options.context)
    anchor: Held | None = None
    for frame in features:
        target = F.normalize(frame, dim=-1)
        if anchor is None:
            anchor = Held(target, first)
            continue
        labels = carried(target, [anchor, *recent], k=options.k, radius=options.radius, temperature=options.temperature)
        recent.append(Held(target, labels))
        yield labels


def carried(target: Tensor, context: Sequence[Held], *, k: int, radius: int, temperature: float) -> Tensor:
    """Labels of a frame: of each patch, the weighted mean of those of the most similar patches of the context.

    Row by row, so that memory is that of one row's similarities.

    Args:
        target: features (h, w, C) of length 1 each.
        context: frames of the same grid, at least one.
        k: patches that vote, from all frames together; all that are as similar as the last of them.
        radius: they lie within so many rows and columns; 0 for anywhere.
        temperature: weights are exp(cosine / temperature).

    Returns:
        (h, w, K) in [0, 1].
    """
    h, w, channels = target.shape
    # Rows first, so that the rows around a patch are one piece of memory: (h, n, w, ...).
    features = torch.stack([held.features for held in context], dim=1)
    labels = torch.stack([held.labels for held in context], dim=1)
    columns = torch.arange(w, device=target.device)
    far = (columns[:, None] - columns).abs() > (radius or w)  # (w, w)
    found = []
    for row in range(h):
        near = slice(max(row - radius, 0), row + radius + 1) if radius else slice(None)
        around = features[near].reshape(-1, channels)  # (rows n w, C)
        similar = (target[row] @ around.T).view(w, -1, w).masked_fill(far[:, None], -torch.inf).flatten(1)
        best = similar.topk(min(k, similar.shape[1])).values
        # Less the largest, which changes nothing in the weights and keeps them finite at any temperature.
        weights = ((similar - best[:, :1]) / temperature).masked_fill(similar < best[:, -1:], -torch.inf).softmax(-1)
        found.append(weights @ labels[near].reshape(len(around), -1))
    return torch.stack(found)


def at_patches(labels: Tensor, objects: Sequence[int], size: tuple[int, int], patch_size: int, stride: int) -> Tensor:
    """Labels of patches: that of the pixel at the middle of each.

    Args:
        labels: of a frame's pixels, (H, W): numbers of objects, 0 for the background, less for no label.
        objects: the numbers.
        size: at which the frame is shown, in pixels.
        patch_size: side of a patch in pixels of what is shown.
        stride: distance between patches.

    Returns:
        (h, w, 1 + objects) float32 of 0 and 1, the background first; all 0 where there is no label.
    """
    rows, columns = (
        torch.from_numpy((patch_centres(side, patch_size, stride) * pixels).astype(np.int64))
        for side, pixels in zip(size, labels.shape, strict=True)
    )
    middle = labels[rows][:, columns]
    return (middle[..., None] == torch.tensor([0, *objects])).float()


def to_mask(labels: Tensor, height: int, width: int, size: tuple[int, int], patch_size: int, stride: int) -> Tensor:
    """The label that each pixel of a frame of height x width pixels has most of: (H, W) int64, 0 to K - 1.

    Bilinear between patches; then each label is made to reach from 0 to 1, as published.

    Args:
        labels: (h, w, K) of patches.
        height: of the frame.
        width: of the frame.
        size: at which the frame was shown, in pixels.
        patch_size: side of a patch in pixels of what was shown.
        stride: distance between patches.
    """
    rows, columns = Crop.whole(size).places(height, width)
    return filled(at_places(labels, rows, columns, patch_size, stride)).argmax(-1)


def filled(labels: Tensor) -> Tensor:
    """Labels (H, W, K), each shifted and scaled to reach from 0 to 1; one that is the same everywhere stays."""
    low, high = labels.amin((0, 1)), labels.amax((0, 1))
    return torch.where(high > low, (labels - low) / (high - low).clamp(min=torch.finfo(labels.dtype).tiny), labels)
