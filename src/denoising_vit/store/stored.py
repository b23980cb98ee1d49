"""One image's features as they come out of a store."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from denoising_vit.decomposition.result import Decomposition
from denoising_vit.errors import StoreError


class MissingImageError(StoreError, KeyError):
    """An image that a store does not have: unknown, not finished yet, or failed."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show it in quotes


@dataclass(frozen=True, eq=False)
class StoredFeatures:
    """The semantic field of one image of a store.

    Attributes:
        index: the image's place in the store.
        id: its name in the dataset.
        field: F on its own nodes, (Ry, Rx, C) float32; nodes are at cell centres of [0, 1]^2.
        record: what was recorded with it, such as ``heldout_r2``; JSON values.
        size: (H, W) in pixels at which the image was shown to the backbone.
        patch_size: side of a patch in pixels.
        stride: distance between patches in pixels.
    """

    index: int
    id: str
    field: Tensor = dataclasses.field(repr=False)
    record: dict[str, Any]
    size: tuple[int, int]
    patch_size: int
    stride: int

    @cached_property
    def semantic(self) -> Tensor:
        """F at the patch centres, (h, w, C)."""
        return self._decomposition.semantic

    def sample(self, coords: Tensor) -> Tensor:
        """F anywhere: bilinear at ``coords`` (..., 2), (x, y) in [0, 1] of the image, origin top left -> (..., C)."""
        return self._decomposition.sample(coords)

    @cached_property
    def _decomposition(self) -> Decomposition:
        """One with a field only: a store keeps neither G nor the raw features."""
        nothing = torch.empty(0)
        return Decomposition(self.field, nothing, nothing, self.size, self.patch_size, self.stride, self.record)
