"""Cleaning of a model's tokens, independent of how the model returns them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from denoising_vit.artifact import SHIPPED, Artifact, load_artifact
from denoising_vit.backbones import Backbone
from denoising_vit.backbones.huggingface import HuggingFaceBackbone
from denoising_vit.backbones.module import Layout, ModuleBackbone
from denoising_vit.backbones.timm_vit import TimmBackbone
from denoising_vit.denoiser.loading import find_denoiser, find_shipped
from denoising_vit.training_free import Subspace, find_subspace
from denoising_vit.training_free.average import DEFAULT_PASSES, aligned_mean, moved, moves, require_passes
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
    """Cleaner of a model's tokens, with its settings."""

    words: str  #: description for ``repr``
    cleaner: nn.Module | None  #: maps features (B, h, w, C) float32 to clean features; None for ``average``
    passes: int | None  #: number of shifted and mirrored passes, for ``average``
    stride: int  #: distance between patches in pixels
    patch_size: int  #: side of a patch in pixels
    prefix: int = 0  #: number of prefix tokens
    depth: int | None = None  #: number of blocks at the time of cleaning; None if unknown
    norm: nn.Module | None = None  #: final norm, after which features are cleaned; None to clean tokens as they are
    normed: bool = True  #: True if the last hidden state of a model of transformers is after the final norm
    layout: Layout = "auto"  #: output layout of a module

    def grid(self, image: Tensor) -> tuple[int, int]:
        """(h, w) of the patch grid of images (B, 3, H, W)."""
        h, w = (patch_count(side, self.patch_size, self.stride) for side in image.shape[2:])
        return h, w

    def features(self, first: Tensor, image: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
        """Clean features from raw features (B, h, w, C); ``again`` returns those of a moved image."""
        if self.cleaner is not None:
            return self.cleaner(first.float())
        plan = moves(self.passes or DEFAULT_PASSES, (first.shape[1], first.shape[2]))
        others = [again(moved(image, move, self.stride)).float() for move in plan[1:]]
        return aligned_mean([first.float(), *others], plan)

    def tokens(self, first: Tensor, image: Tensor, again: Callable[[Tensor], Tensor], *, normed: bool) -> Tensor:
        """Clean patch tokens from raw patch tokens (B, h w, C), in their dtype.

        Args:
            first: patch tokens of ``image``.
            image: normalised images (B, 3, H, W).
            again: returns raw patch tokens of another image.
            normed: True if tokens are after the final norm.
        """
        grid = self.grid(image)
        if normed or self.norm is None or self.cleaner is None:
            clean = self.features(first.unflatten(1, grid), image, lambda other: again(other).unflatten(1, grid))
            return clean.flatten(1, 2).to(first.dtype)
        behind = self.norm(first).float()
        change = self.features(behind.unflatten(1, grid), image, again).flatten(1, 2) - behind
        return (first.float() + change * _scale(first.float(), self.norm)).to(first.dtype)

    def all_tokens(self, first: Tensor, image: Tensor, again: Callable[[Tensor], Tensor], *, normed: bool) -> Tensor:
        """Like :meth:`tokens`, for (B, P + h w, C) with prefix tokens, which are unchanged."""
        prefix, patches = first[:, : self.prefix], first[:, self.prefix :]
        clean = self.tokens(patches, image, lambda other: again(other)[:, self.prefix :], normed=normed)
        return torch.cat([prefix, clean], dim=1)

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


def cleaning_of(method: str, backbone: Backbone, options: dict[str, Any]) -> Cleaning:
    """Cleaning of the tokens of a backbone's model by a method with its options; the backbone itself is not kept."""
    if method == "auto":  # the denoiser that is given or in the package, else the projection
        method = "denoiser" if "denoiser" in options or find_shipped(backbone) is not None else "project"
    cleaner, passes = None, None
    if method == "average":
        passes = options.get("passes", DEFAULT_PASSES)
        require_passes(passes)
    else:  # a copy, because the caller's cleaner must not change
        cleaner = copy.deepcopy(_cleaner(method, backbone, options)).to(backbone.device).eval().requires_grad_(False)
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


def _cleaner(method: str, backbone: Backbone, options: dict[str, Any]) -> nn.Module:
    """Module that cleans features (B, h, w, C) of a backbone."""
    if method == "denoiser":
        return find_denoiser(options.get("denoiser"), backbone).denoiser
    if method == "subtract":
        artifact = _artifact(options.get("artifact", SHIPPED), backbone)
        artifact.require_of(backbone)
        return Minus(artifact)
    found = options.get("subspace")
    if found is None:
        if "artifact" in options:
            options["artifact"] = _artifact(options["artifact"], backbone)
        return find_subspace(backbone, options.pop("photos", None), **options)
    found = found if isinstance(found, Subspace) else Subspace.load(found)
    found.require_of(backbone)
    return found


def _artifact(given: Any, backbone: Backbone) -> Artifact:
    return given if isinstance(given, Artifact) else load_artifact(given, backbone)
