"""A backbone with its cleaner, as one module: clean features in one forward pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from denoising_vit.artifact import Artifact
from denoising_vit.backbones import Backbone, Intermediates
from denoising_vit.denoiser.module import Denoiser
from denoising_vit.training_free.project import Subspace
from denoising_vit.views.positions import sinusoidal_positions

M = TypeVar("M", bound=nn.Module)


class DenoisedViT(nn.Module):
    """Clean features in one pass: ``extractor(image)`` maps (B, 3, H, W) to (B, h, w, C), as the backbone does.

    ``extractor.compile()`` and ``torch.compile(extractor)`` compile backbone and cleaner together. The cleaner, or a
    copy of it, is on the backbone's device and moves with the module; ``extractor.to(dtype)`` converts backbone and
    denoiser, G and position features stay float32, as features are.

    Position features are added as they are, not in proportion to the features: a place then has the same vector in
    every image and every batch, which is what a decoder can learn to read. Their root mean square is 0.7, so that a
    weight of 1 suits features of unit deviation; scale the weight with the features' standard deviation
    (``extractor(image).std()``).

    Args:
        backbone: the extractor.
        cleaner: its denoiser; its G, which is resampled to the grid of the images and taken away from all features; or
            its positional directions, which are projected out.
        positions: weight of fixed sinusoidal position features (`sinusoidal_positions`)
            that are added to the clean features, for tasks that need place; the paper found that detection does.

    Raises:
        ArtifactError: if the artifact is that of another backbone.
        DenoiserError: if the denoiser is.
        ValueError: if the weight is negative or not finite, or there are too few channels for position features.
    """

    def __init__(self, backbone: Backbone, cleaner: Artifact | Denoiser | Subspace, *, positions: float = 0.0) -> None:
        super().__init__()
        cleaner.require_of(backbone)
        if not (math.isfinite(positions) and positions >= 0):
            raise ValueError(f"positions must be a finite weight, 0 or more, got {positions}")
        if positions:
            sinusoidal_positions((1, 1), backbone.embed_dim)  # refuses too few channels now, not later
        self.backbone = backbone
        self.positions = float(positions)
        self.denoiser = _on(backbone.device, cleaner) if isinstance(cleaner, Denoiser) else None
        self.subspace = _on(backbone.device, cleaner) if isinstance(cleaner, Subspace) else None
        self.artifact = _moved(cleaner, backbone.device) if isinstance(cleaner, Artifact) else None
        self._kept: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, image: Tensor) -> Tensor:
        """Clean features, (B, h, w, C) float32, of normalised images (B, 3, H, W).

        Raises:
            SizeError: if H or W does not fit the patch grid.
        """
        return self.clean(self.backbone(image))

    def forward_with_prefix(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Clean features (B, h, w, C) and the prefix tokens as they are (B, P, C)."""
        features, prefix = self.backbone.forward_with_prefix(image)
        return self.clean(features), prefix

    def forward_intermediates(self, image: Tensor, layers: Sequence[int]) -> Intermediates:
        """Clean features, and beside them prefix tokens and the raw features of other layers, of one forward pass.

        Only ``features`` is cleaned, since the cleaner is that of one layer; the rest is what
        :meth:`Backbone.forward_intermediates` gives, normalised as the backbone's output is.

        Args:
            image: normalised images (B, 3, H, W).
            layers: indices of the backbone's blocks, 0 to ``backbone.depth`` - 1, negative from the end.

        Raises:
            BackboneError: if the backbone's blocks are not known, as those of a module, or there is no such block.
            SizeError: if H or W does not fit the patch grid.
        """
        found = self.backbone.forward_intermediates(image, layers)
        return found._replace(features=self.clean(found.features))

    def clean(self, features: Tensor) -> Tensor:
        """Clean features (B, h, w, C) of the backbone's own (B, h, w, C), where a caller has those already."""
        cleaner = self.denoiser or self.subspace
        clean = features if cleaner is None else cleaner(features)
        if self.artifact is None and not self.positions:
            return clean
        return clean + self._added((clean.shape[1], clean.shape[2]), clean.device)

    def _added(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """What all images of a grid have added, (h, w, C) float32; kept, as most callers have one size."""
        if torch.compiler.is_compiling():
            return self._made(grid, device)  # in the graph: one that reads what is kept would be compiled again for it
        kept = self._kept  # read once and replaced as a whole: another thread may have another size
        if kept is None or kept[0] != grid or kept[1].device != device:
            self._kept = kept = grid, self._made(grid, device)
        return kept[1]

    def _made(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Weighted position features minus G, (h, w, C)."""
        cleared = None if self.artifact is None else -self.artifact.at(grid).to(device)
        if not self.positions:
            assert cleared is not None
            return cleared
        step = self.backbone.stride / self.backbone.patch_size
        places = self.positions * sinusoidal_positions(grid, self.backbone.embed_dim, step=step, device=device)
        return places if cleared is None else places + cleared

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Moves G along, which is no parameter; never rounded, as features are float32 in any precision."""
        super()._apply(fn, recurse)
        if self.artifact is not None:
            self.artifact = _moved(self.artifact, self.backbone.device)
        return self

    def extra_repr(self) -> str:
        """One line for ``repr``."""
        cleaner = "minus G" if self.denoiser is None else "with a denoiser"
        if self.subspace is not None:
            cleaner = f"without {self.subspace.rank} positional directions"
        return f"{cleaner}, positions {self.positions:g}" if self.positions else cleaner


def _on(device: torch.device, module: M) -> M:
    """The module, or a copy if it is on another device: moving the caller's own would change it."""
    here = all(tensor.device == device for tensor in (*module.parameters(), *module.buffers()))
    return module if here else copy.deepcopy(module).to(device)


def _moved(artifact: Artifact, device: torch.device) -> Artifact:
    return replace(artifact, values=artifact.values.to(device))
