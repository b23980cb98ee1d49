"""An extractor as a module that can be traced with any batch, height and width."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.huggingface import HuggingFaceBackbone
from denoising_vit.denoiser.denoised_vit import DenoisedViT
from denoising_vit.export.resampling import resample, resample_positions, timm_resamples_in_graph
from denoising_vit.views.patch_grid import patch_count
from denoising_vit.views.positions import sinusoidal_positions

#: How timm lays out the rotary embedding of DINOv3: rows before columns, each axis by its own length.
PLAIN_ROPE = ("ij", "separate")

#: An extractor: raw features, or clean ones.
Extractor = Backbone | DenoisedViT


class TraceableExtractor(nn.Module):
    """What an exported graph computes: (B, 3, H, W) to features (B, h, w, C), and prefix tokens (B, P, C) if asked for.

    A copy of the extractor in float32 on the CPU. Position embeddings and G are resampled in the graph, so that no size
    is special.

    Args:
        extractor: a backbone, or what :class:`~denoising_vit.DenoisedViT` makes of it.
        pixels: whether images come in [0, 1], and are normalised in the graph.
        prefix: whether prefix tokens are given as well.
    """

    def __init__(self, extractor: Extractor, *, pixels: bool = False, prefix: bool = False) -> None:
        super().__init__()
        self._original = (extractor,)  # in a tuple, so that it is no part of the module
        whole = copy.deepcopy(extractor).to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)
        self.backbone = whole if isinstance(whole, Backbone) else whole.backbone
        self.denoiser = None if isinstance(whole, Backbone) else whole.denoiser
        self.positions = 0.0 if isinstance(whole, Backbone) else whole.positions
        self.artifact: Tensor | None
        artifact = None if isinstance(whole, Backbone) else whole.artifact
        self.register_buffer("artifact", None if artifact is None else artifact.values.float())
        self.prefix = prefix
        self.mean: Tensor | None
        self.std: Tensor | None
        self.register_buffer("mean", torch.tensor(self.backbone.mean).view(3, 1, 1) if pixels else None)
        self.register_buffer("std", torch.tensor(self.backbone.std).view(3, 1, 1) if pixels else None)
        _resample_in_graph(self.backbone, self.denoiser)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Features, and prefix tokens if asked for."""
        if self.mean is not None and self.std is not None:
            image = (image - self.mean) / self.std
        tokens, prefix = self.backbone._tokens(image)
        grid = self._grid(image)
        features = tokens.unflatten(1, grid)  # (B, h w, C) -> (B, h, w, C)
        if self.denoiser is not None:
            features = self.denoiser(features)
        if self.artifact is not None:
            artifact = resample(self.artifact, grid)
            features = features - (artifact - artifact.mean((0, 1)))
        if self.positions:
            step = self.backbone.stride / self.backbone.patch_size
            features = features + self.positions * sinusoidal_positions(grid, self.backbone.embed_dim, step=step)
        return (features, prefix) if self.prefix else features

    def _grid(self, image: Tensor) -> tuple[int, int]:
        """(h, w) without the check of :meth:`Backbone.grid_size`, which a graph cannot hold."""
        patch, stride = self.backbone.patch_size, self.backbone.stride
        h, w = (patch_count(side, patch, stride) for side in image.shape[2:])
        return h, w

    def reference(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """The extractor in float32 on the CPU by the way that its users take, with the same input."""
        plain = copy.deepcopy(self._original[0]).to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)

        def run(image: Tensor) -> tuple[Tensor, Tensor]:
            if self.mean is not None and self.std is not None:
                image = (image - self.mean) / self.std
            return plain.forward_with_prefix(image)

        return run

    def tracing(self) -> contextlib.AbstractContextManager[None]:
        """What must last while the module is run or traced."""
        return timm_resamples_in_graph()


def _rotary(rope: Any, shape: Sequence[int]) -> Tensor:
    """DINOv3's rotary embedding as timm has it (h w, 2 D), for a shape that may be symbolic."""
    centres = [
        2 * ((torch.arange(side, dtype=torch.float32) + 0.5 + rope.grid_offset) / torch.ones(()).mul(side)) - 1
        for side in shape
    ]
    places = torch.stack(torch.meshgrid(centres, indexing="ij"), dim=-1).flatten(0, 1)  # (h, w, 2) -> (h w, 2)
    return torch.cat(rope._get_pos_embed_from_coords(places), dim=-1)


def _resample_in_graph(backbone: Backbone, denoiser: Any) -> None:
    """Replaces what resamples positions with a branch on the size, in models that are ours alone."""
    if denoiser is not None:
        own, grid = denoiser.pos_embed, denoiser.grid
        denoiser.position = lambda h, w: resample_positions(own, (h, w), old=grid, prefix=0)
    rope: Any = getattr(getattr(backbone, "model", None), "rope", None)
    if type(rope).__name__ == "RotaryEmbeddingDinoV3" and (rope.grid_indexing, rope.normalize_coords) == PLAIN_ROPE:
        rope._create_embed = lambda shape, no_aug=False: _rotary(rope, shape)  # timm's makes numbers of the shape
    embeddings: Any = getattr(backbone.model, "embeddings", None) if isinstance(backbone, HuggingFaceBackbone) else None
    if embeddings is None or not hasattr(embeddings, "interpolate_pos_encoding"):
        return
    kept = backbone.family.class_tokens if isinstance(backbone, HuggingFaceBackbone) else 0
    antialias = "registers" in type(embeddings).__name__.lower()  # transformers' other families do without

    def interpolated(_tokens: Tensor, height: int, width: int) -> Tensor:
        table = getattr(embeddings, "position_embeddings", None)
        positions = embeddings.position_embedding.weight[None] if table is None else table
        size = height // backbone.patch_size, width // backbone.patch_size
        return resample_positions(positions, size, prefix=kept, antialias=antialias)

    embeddings.interpolate_pos_encoding = interpolated
