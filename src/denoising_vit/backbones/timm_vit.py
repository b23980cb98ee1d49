"""Backbones from timm: every VisionTransformer and Eva model with patch tokens, by its timm name."""

from __future__ import annotations

import difflib
from typing import Any

import timm
from timm.data.config import resolve_model_data_config
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from denoising_vit.backbones.base import Backbone
from denoising_vit.backbones.runtime import seeded
from denoising_vit.errors import BackboneError
from denoising_vit.views.patch_grid import nearest_sizes


class TimmBackbone(Backbone):
    """A timm ViT.

    Args:
        model: built by :func:`build_timm_model`.
        name: its timm name.
        stride: distance between patches; the patch size by default.
        layer: block whose output is taken, negative from the end.
        norm: whether to apply the model's final norm.
        weights: where the weights came from, in words.

    Raises:
        BackboneError: if the layer does not exist or the stride is out of range.
    """

    def __init__(
        self, model: VisionTransformer | Eva, *, name: str, stride: int | None, layer: int, norm: bool, weights: str
    ) -> None:
        config = resolve_model_data_config(model)
        patch_size = _square_patch(model, name)
        depth = len(model.blocks)
        if not -depth <= layer < depth:
            raise BackboneError(f"{name} has {depth} blocks: layer must be {-depth} to {depth - 1}, got {layer}")
        super().__init__(
            name=name,
            patch_size=patch_size,
            stride=patch_size if stride is None else stride,
            embed_dim=model.embed_dim,
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            default_size=518 // patch_size * patch_size,  # 518 for patch 14, 512 for 8 and 16
            layer=layer % depth,
            norm=norm,
            weights=weights,
            depth=depth,
        )
        if self.stride != patch_size:
            model.set_submodule("patch_embed", OverlappingPatchEmbed(model.patch_embed, self.stride))
        self.model = model

    def _tokens(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self._intermediate_tokens(image, ())[0]

    def _intermediate_tokens(self, image: Tensor, blocks: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        assert self.layer is not None
        blocks = (self.layer, *blocks)
        rising = sorted(set(blocks))  # timm gives each block once, in its own order
        # Tokens are asked for in a row: reshaped by timm they get the wrong grid where patches overlap.
        found: Any = self.model.forward_intermediates(
            image,
            indices=rising,
            norm=self.norm,
            stop_early=True,
            output_fmt="NLC",
            return_prefix_tokens=self.model.num_prefix_tokens > 0,
            intermediates_only=True,
        )
        tokens = [self._split(part) for part in found]
        return [tokens[rising.index(block)] for block in blocks]

    def _split(self, tokens: Any) -> tuple[Tensor, Tensor]:
        """Patch tokens and prefix tokens of one block, normalised: a pair where the model has prefix tokens."""
        patches, prefix = tokens if isinstance(tokens, tuple) else (tokens, tokens[:, :0])
        # Models that pool by the mean keep their final norm behind the pooling.
        pooled = self.norm and isinstance(self.model.norm, nn.Identity)
        return (self.model.fc_norm(patches), self.model.fc_norm(prefix)) if pooled else (patches, prefix)

    def _fingerprint_size(self) -> int:
        # A fingerprint needs no large image, and the model takes any size.
        return nearest_sizes(8 * self.patch_size, self.patch_size, self.stride)[0]


class OverlappingPatchEmbed(nn.Module):
    """timm's patch embedding with a stride of its own: (B, 3, H, W) -> (B, h, w, C).

    timm's module refuses sizes that are no multiple of the patch, which overlapping patches do not need.
    """

    def __init__(self, embed: Any, stride: int) -> None:
        super().__init__()
        self.grid_size = embed.grid_size  # of the position embedding; timm resamples from it
        self.patch_size = embed.patch_size
        self.proj = embed.proj
        self.proj.stride = (stride, stride)
        self.norm = embed.norm

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, C)."""
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


def build_timm_model(name: str, *, pretrained: bool, depth: int | None = None) -> VisionTransformer | Eva:
    """Builds a timm model that takes any image size.

    Args:
        name: as timm knows it, with or without the tag of its weights.
        pretrained: fetch the weights from the hub.
        depth: number of blocks where it is not to be the model's own; for trials with random weights.

    Raises:
        BackboneError: if timm does not know it, or it is no plain ViT.
    """
    architecture = name.split(".")[0]
    if architecture not in timm.list_models():
        similar = ", ".join(difflib.get_close_matches(architecture, timm.list_models(), n=3))
        raise BackboneError(
            f"timm {timm.__version__} knows no model {name!r}"
            + (f"; similar: {similar}" if similar else "")
            + ". `dvit models` lists the published ones; any other module can be passed with its patch size"
        )
    try:
        # timm draws initial weights from the global generator; a model to be loaded must not disturb the caller's.
        with seeded(0):
            blocks: dict[str, Any] = {} if depth is None else {"depth": depth}
            model = timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True, **blocks)
    except TypeError as error:  # an architecture without this option
        raise BackboneError(f"{name} is no plain ViT (it takes no dynamic_img_size): {error}") from error
    except RuntimeError as error:
        if pretrained and "tag" not in str(error):
            raise
        raise BackboneError(f"timm could not build {name!r}: {error}") from error
    if not isinstance(model, VisionTransformer | Eva):
        raise BackboneError(
            f"{name} is a {type(model).__name__}; expected a VisionTransformer or Eva with patch tokens. "
            "Wrap it yourself: load_backbone(module, patch_size=...)"
        )
    return model.eval().requires_grad_(False)


def _square_patch(model: VisionTransformer | Eva, name: str) -> int:
    patch = getattr(model.patch_embed, "patch_size", None)
    proj = getattr(model.patch_embed, "proj", None)
    if not isinstance(proj, nn.Conv2d) or proj.in_channels != 3 or patch is None or patch[0] != patch[1]:
        raise BackboneError(f"{name} does not cut the image into square patches ({type(model.patch_embed).__name__})")
    return int(patch[0])
