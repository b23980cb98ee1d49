"""A backbone and its cleaner as one module: clean features in one forward pass."""

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
from denoising_vit.views.sampling import sinusoidal_positions

M = TypeVar("M", bound=nn.Module)


class DenoisedViT(nn.Module):
    """Clean features in one pass: ``extractor(image)`` maps (B, 3, H, W) to (B, h, w, C), as the backbone does.

    ``extractor.compile()`` and ``torch.compile(extractor)`` compile backbone and cleaner together. The cleaner, or a
    copy of it, is on the backbone's device and moves with the module. ``extractor.to(dtype)`` converts backbone and
    denoiser; G and position features stay float32, like features.

    Position features are added unscaled, not in proportion to the features, so that a position has the same vector in
    every image and every batch, which a decoder can learn to read. Their root mean square is 0.7, so that a weight of 1
    suits features with unit standard deviation; for others, multiply the weight by the features' standard deviation
    (``extractor(image).std()``).

    Args:
        backbone: the extractor.
        cleaner: its denoiser; or its G, which is resampled to the images' grid and subtracted from all features; or its
            positional directions, which are projected out.
        positions: weight of fixed sinusoidal position features (`sinusoidal_positions`) to add to the clean features,
            for tasks that need position, such as detection in the paper.

    Raises:
        ArtifactError: if the artifact belongs to another backbone.
        DenoiserError: if the denoiser belongs to another backbone.
        ValueError: if the weight is negative or not finite, or there are too few channels for position features.
    """

    def __init__(self, backbone: Backbone, cleaner: Artifact | Denoiser | Subspace, *, positions: float = 0.0) -> None:
        super().__init__()
        cleaner.require_of(backbone)
        if not (math.isfinite(positions) and positions >= 0):
            raise ValueError(f"positions must be a finite weight of at least 0, got {positions}")
        if positions:
            sinusoidal_positions((1, 1), backbone.embed_dim)  # rejects too few channels now, not later
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
        """Clean features (B, h, w, C) and the unchanged prefix tokens (B, P, C)."""
        features, prefix = self.backbone.forward_with_prefix(image)
        return self.clean(features), prefix

    def forward_intermediates(self, image: Tensor, layers: Sequence[int]) -> Intermediates:
        """Clean features, prefix tokens, and the raw features of other layers, in one forward pass.

        Only ``features`` is cleaned, because the cleaner belongs to one layer; everything else is as in
        :meth:`Backbone.forward_intermediates`, normalised like the backbone's output.

        Args:
            image: normalised images (B, 3, H, W).
            layers: indices of the backbone's blocks, 0 to ``backbone.depth`` - 1, negative from the end.

        Raises:
            BackboneError: if the backbone's blocks are unknown, as for a module, or a layer does not exist.
            SizeError: if H or W does not fit the patch grid.
        """
        found = self.backbone.forward_intermediates(image, layers)
        return found._replace(features=self.clean(found.features))

    def clean(self, features: Tensor) -> Tensor:
        """Clean features (B, h, w, C) from the backbone's features (B, h, w, C), if they have already been computed."""
        cleaner = self.denoiser or self.subspace
        clean = features if cleaner is None else cleaner(features)
        if self.artifact is None and not self.positions:
            return clean
        return clean + self._added((clean.shape[1], clean.shape[2]), clean.device)

    def _added(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """The term added to all images of a grid, (h, w, C) float32; cached, because most callers use one size."""
        if torch.compiler.is_compiling():
            return self._made(grid, device)  # in the graph: reading the cache would cause a recompilation
        kept = self._kept  # read once and replaced as a whole: another thread may use another size
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
        """Move G, which is not a parameter; it is never rounded, because features are float32 in any precision."""
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
    """The module, or a copy if it is on another device, so that the caller's object is not changed."""
    here = all(tensor.device == device for tensor in (*module.parameters(), *module.buffers()))
    return module if here else copy.deepcopy(module).to(device)


def _moved(artifact: Artifact, device: torch.device) -> Artifact:
    return replace(artifact, values=artifact.values.to(device))
