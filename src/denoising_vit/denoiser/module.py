"""The denoiser: one transformer block (or a few) that maps raw features to clean ones in a single pass."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.attention import BlockedAttention
from denoising_vit.backbones.recorded import backbone_words, is_recorded, recorded_words
from denoising_vit.errors import DenoiserError

#: Channels of an attention head.
_HEAD = 64

#: Deviation of the position embedding that training starts from.
_INITIAL_DEVIATION = 0.02


class Denoiser(nn.Module, PyTorchModelHubMixin, library_name="denoising-vit", tags=["denoising-vit"]):
    """Raw features (B, h, w, C) to clean ones, on any grid (section 4.2 of the paper).

    A learned position embedding is added, then come transformer blocks with heads of 64 channels; no residual around
    them and no final norm. Parameters are named as in the published checkpoints. ``save_pretrained``,
    ``from_pretrained`` and ``push_to_hub`` are those of huggingface_hub's model mixin; :func:`read_denoiser` and
    :func:`write_denoiser` have one file each.

    Args:
        embed_dim: C, a multiple of 64.
        grid: (h, w) of the position embedding; it is resampled to other grids.
        blocks: how many.
        trained_for: the backbone that it was trained for, as it is recorded with results; None where that is not known,
            as of the published ones.
        info: how it was trained; JSON values.

    Raises:
        ValueError: if C is no multiple of 64, or there is no block.
    """

    def __init__(
        self,
        embed_dim: int,
        grid: tuple[int, int] = (37, 37),
        blocks: int = 1,
        trained_for: dict[str, Any] | None = None,
        info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if embed_dim < _HEAD or embed_dim % _HEAD:
            raise ValueError(f"a denoiser's width must be a multiple of {_HEAD} channels, got {embed_dim}")
        if blocks < 1:
            raise ValueError(f"a denoiser needs 1 block or more, got {blocks}")
        if min(grid) < 1:
            raise ValueError(f"a denoiser's grid must have 1 place or more along each side, got {tuple(grid)}")
        self.embed_dim, self.grid, self.blocks = embed_dim, (int(grid[0]), int(grid[1])), blocks
        self.trained_for, self.info = trained_for, info or {}
        self.pos_embed = nn.Parameter(torch.randn(1, grid[0] * grid[1], embed_dim) * _INITIAL_DEVIATION)
        made = [_block(embed_dim) for _ in range(blocks)]
        self.denoiser = made[0] if blocks == 1 else nn.Sequential(*made)  # as published: `denoiser.0.` only with more

    @property
    def config(self) -> dict[str, Any]:
        """What makes another of the same shape and record: ``Denoiser(**config)``; JSON values."""
        shape = {"embed_dim": self.embed_dim, "grid": list(self.grid), "blocks": self.blocks}
        return shape | {"trained_for": self.trained_for, "info": self.info}

    def save_pretrained(self, save_directory: str | Path, *, config: Any = None, **others: Any) -> str | None:
        """Writes ``model.safetensors`` and ``config.json`` into a folder, with the record as it is now."""
        return super().save_pretrained(save_directory, config=self.config if config is None else config, **others)

    def require_of(self, backbone: Backbone) -> None:
        """Refuses a backbone that the denoiser is not for.

        Raises:
            DenoiserError: naming both.
        """
        if self.embed_dim != backbone.embed_dim:
            raise DenoiserError(
                f"the denoiser has {self.embed_dim} channels; {backbone_words(backbone)} has {backbone.embed_dim}. Use "
                "one that was trained for it"
            )
        if self.trained_for is not None and not is_recorded(self.trained_for, backbone):
            raise DenoiserError(
                f"the denoiser was trained for {recorded_words(self.trained_for)}; got {backbone_words(backbone)}. Use "
                "the backbone that it was trained for"
            )

    def forward(self, features: Tensor) -> Tensor:
        """Clean features (B, h, w, C), float32, of raw ones (B, h, w, C).

        Raises:
            ValueError: if the features are of another width, or no grid.
        """
        if features.ndim != 4 or features.shape[-1] != self.embed_dim:
            raise ValueError(f"expected features (B, h, w, {self.embed_dim}), got {tuple(features.shape)}")
        h, w = features.shape[1:3]
        tokens = features.flatten(1, 2).to(self.pos_embed.dtype) + self.position(h, w)  # (B, h, w, C) -> (B, h w, C)
        with self._attention(tokens):
            clean = self.denoiser(tokens)
        return clean.float().unflatten(1, (h, w))

    def position(self, h: int, w: int) -> Tensor:
        """The position embedding of a grid, (1, h w, C): bicubic where it is not its own."""
        if (h, w) == self.grid:
            return self.pos_embed
        return resample_abs_pos_embed(self.pos_embed, [h, w], old_size=list(self.grid), num_prefix_tokens=0)

    def _attention(self, tokens: Tensor) -> contextlib.AbstractContextManager[object]:
        """On a CPU in bfloat16, without gradients, the blocked attention is faster than torch's own kernel."""
        fast = tokens.device.type == "cpu" and tokens.dtype == torch.bfloat16 and not torch.is_grad_enabled()
        return BlockedAttention() if fast and not torch.compiler.is_compiling() else contextlib.nullcontext()

    def extra_repr(self) -> str:
        """One line for ``repr``."""
        return f"C {self.embed_dim}, grid {self.grid[0]} x {self.grid[1]}, blocks {self.blocks}"


def _block(embed_dim: int) -> Block:
    return Block(
        dim=embed_dim,
        num_heads=embed_dim // _HEAD,
        mlp_ratio=4,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),  # pyright: ignore[reportArgumentType]
    )
