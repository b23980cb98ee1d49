"""Cleaning of a model's tokens, independent of how the model returns them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from denoising_vit.artifact import Artifact
from denoising_vit.backbones import Backbone
from denoising_vit.backbones.huggingface import HuggingFaceBackbone
from denoising_vit.backbones.module import Layout, ModuleBackbone
from denoising_vit.backbones.timm_vit import TimmBackbone
from denoising_vit.training_free.average import DEFAULT_PASSES, aligned_mean, moved, moves
from denoising_vit.views.patch_grid import patch_count


class Minus(nn.Module):
    """Subtracts G, resampled to the grid of the features."""

    values: Tensor

    def __init__(self, artifact: Artifact) -> None:
        super().__init__()
        self.register_buffer("values", artifact.values)
        self._size = artifact.size

    def forward(self, features: Tensor) -> Tensor:
        """Clean features (B, h, w, C)."""
        artifact = Artifact(self.values, self._size, {})
        return features - artifact.at((features.shape[1], features.shape[2]))


@dataclass
class Cleaning:
    """Cleaner of a model's tokens, with its settings.

    Attributes:
        words: description for ``repr``.
        cleaner: maps features (B, h, w, C) float32 to clean features; None for ``average``.
        passes: number of shifted and mirrored passes, for ``average``.
        stride: distance between patches in pixels.
        patch_size: side of a patch in pixels.
        prefix: number of prefix tokens.
        depth: number of blocks at the time of cleaning; None if unknown.
        norm: final norm, after which features are cleaned; None if tokens are cleaned as they are.
        normed: True if the last hidden state of a model of transformers is after the final norm.
        layout: output layout of a module.
    """

    words: str
    cleaner: nn.Module | None
    passes: int | None
    stride: int
    patch_size: int
    prefix: int = 0
    depth: int | None = None
    norm: nn.Module | None = None
    normed: bool = True
    layout: Layout = "auto"

    def grid(self, image: Tensor) -> tuple[int, int]:
        """(h, w) of the patch grid of images (B, 3, H, W)."""
        height, width = image.shape[2:]
        return (patch_count(height, self.patch_size, self.stride), patch_count(width, self.patch_size, self.stride))

    def features(self, first: Tensor, image: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
        """Clean features from raw features (B, h, w, C); ``again`` returns those of a moved image."""
        if self.cleaner is not None:
            return self.cleaner(first.float())
        plan = moves(self.passes or DEFAULT_PASSES, (first.shape[1], first.shape[2]))
        others = [again(moved(image, move, self.stride)).float() for move in plan[1:]]
        return aligned_mean([first.float(), *others], plan)

    def tokens(
        self, first: Tensor, grid: tuple[int, int], image: Tensor, again: Callable[[Tensor], Tensor], normed: bool
    ) -> Tensor:
        """Clean patch tokens from raw patch tokens (B, h w, C), in their dtype.

        Args:
            first: patch tokens of ``image``.
            grid: (h, w).
            image: normalised images (B, 3, H, W).
            again: returns raw patch tokens of another image.
            normed: True if tokens are after the final norm.
        """
        if normed or self.norm is None or self.cleaner is None:
            clean = self.features(first.unflatten(1, grid), image, lambda other: again(other).unflatten(1, grid))
            return clean.flatten(1, 2).to(first.dtype)
        behind = self.norm(first).float()
        change = self.features(behind.unflatten(1, grid), image, again).flatten(1, 2) - behind
        return (first.float() + change * _scale(first.float(), self.norm)).to(first.dtype)

    def moved_by(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the cleaner with the model to another device, without changing its precision."""
        if self.cleaner is not None:
            self.cleaner._apply(lambda tensor: tensor.to(fn(tensor).device))


def _scale(tokens: Tensor, norm: nn.Module) -> Tensor:
    """Deviation of each token divided by the norm's weight, (B, N, C), to undo the norm; 0 where the weight is 0."""
    centred = tokens - tokens.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else tokens
    eps = getattr(norm, "eps", None) or 1e-6
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    weight = getattr(norm, "weight", None)
    if weight is None:
        return deviation.expand_as(tokens)
    weight = weight.float()
    return deviation * torch.where(weight.abs() > 1e-6, 1 / weight, torch.zeros_like(weight))


def cleaning_of(method: str, cleaner: nn.Module | None, passes: int | None, backbone: Backbone) -> Cleaning:
    """Cleaning of the tokens of a backbone's model; the backbone itself is not kept."""
    if cleaner is not None:  # the caller's cleaner is not changed
        cleaner = copy.deepcopy(cleaner).to(backbone.device).eval().requires_grad_(False)
    what = {
        "subtract": "minus the artifact G",
        "denoiser": "through a denoiser",
        "project": f"without {getattr(cleaner, 'rank', '')} positional directions",
        "average": f"mean of {passes} shifted and mirrored passes",
    }
    words = f"cleaned patch tokens: {what.get(method, method)} (denoising_vit.restore undoes it)"
    made = Cleaning(words, cleaner, passes, backbone.stride, backbone.patch_size, depth=backbone.depth)
    if isinstance(backbone, ModuleBackbone):
        made.layout, made.prefix = backbone.layout, backbone.prefix_tokens or 0
    elif isinstance(backbone, TimmBackbone):
        norm = backbone.model.fc_norm if isinstance(backbone.model.norm, nn.Identity) else backbone.model.norm
        made.norm = None if isinstance(norm, nn.Identity) else norm
        made.prefix = backbone.model.num_prefix_tokens
    elif isinstance(backbone, HuggingFaceBackbone):
        made.norm = backbone.model.get_submodule(backbone.family.norm)
        made.prefix, made.normed = backbone.family.prefix_tokens(backbone.model.config), backbone.family.normed
    return made
