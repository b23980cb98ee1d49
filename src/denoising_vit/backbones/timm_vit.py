"""Backbones from timm: VisionTransformer, Eva and NaFlexVit models by their timm names."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import timm
from timm.data.config import resolve_model_data_config
from timm.layers.format import Format
from timm.models import model_entrypoint
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from denoising_vit.backbones.base import Backbone
from denoising_vit.backbones.runtime import seeded
from denoising_vit.backbones.subclassing import shallow
from denoising_vit.errors import BackboneError
from denoising_vit.views.patch_grid import nearest_sizes

#: timm's classes whose tokens form a single patch grid at any image size.
TimmViT = VisionTransformer | Eva | NaFlexVit


class TimmBackbone(Backbone):
    """A timm ViT as a backbone; the model supports any image size (:func:`build_timm_model`, :func:`any_size`).

    Raises:
        BackboneError: if the layer does not exist, the stride is out of range, or patches are not square.
    """

    def __init__(self, model: TimmViT, *, name: str, stride: int | None, layer: int, norm: bool, weights: str) -> None:
        config = resolve_model_data_config(model)
        patch_size = _square_patch(model, name)
        super().__init__(
            name=name,
            patch_size=patch_size,
            stride=patch_size if stride is None else stride,
            embed_dim=model.embed_dim,
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            default_size=518 // patch_size * patch_size,  # 518 for patch 14, 512 for 8 and 16
            layer=layer,
            norm=norm,
            weights=weights,
            depth=len(model.blocks),
        )
        if self.stride != patch_size:
            if isinstance(model, NaFlexVit):
                raise BackboneError(f"{name} is a NaFlexVit, whose patches cannot overlap; omit the stride")
            model.set_submodule("patch_embed", OverlappingPatchEmbed(model.patch_embed, self.stride))
        self.model = model

    def _tokens(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self._intermediate_tokens(image, ())[0]

    def _intermediate_tokens(self, image: Tensor, blocks: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        assert self.layer is not None
        blocks = (self.layer, *blocks)
        rising = sorted(set(blocks))  # timm returns each block once, in ascending order
        # Flat tokens (NLC), because timm's reshape gives a wrong grid for overlapping patches.
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
        """Patch and prefix tokens of one block, normalised; timm returns a pair if the model has prefix tokens."""
        patches, prefix = tokens if isinstance(tokens, tuple) else (tokens, tokens[:, :0])
        # Models with mean pooling have their final norm after the pooling.
        pooled = self.norm and isinstance(self.model.norm, nn.Identity)
        return (self.model.fc_norm(patches), self.model.fc_norm(prefix)) if pooled else (patches, prefix)

    def _fingerprint_size(self) -> int:
        # A fingerprint needs no large image, and the model supports any size.
        return nearest_sizes(8 * self.patch_size, self.patch_size, self.stride)[0]


class OverlappingPatchEmbed(nn.Module):
    """timm's patch embedding with another stride: (B, 3, H, W) -> (B, h, w, C).

    timm's module supports only multiples of the patch size, which overlapping patches do not need.
    """

    def __init__(self, embed: Any, stride: int) -> None:
        super().__init__()
        self.grid_size = embed.grid_size  # grid of the position embedding; timm resamples from it
        self.patch_size = embed.patch_size
        self.proj = embed.proj
        self.proj.stride = (stride, stride)
        self.norm = embed.norm

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, C)."""
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


def build_timm_model(name: str, *, pretrained: bool, **changes: Any) -> TimmViT:
    """Build a timm model that supports any image size, frozen and in evaluation mode.

    Args:
        name: timm name, with or without the tag of the weights.
        pretrained: download the weights from the hub.
        **changes: further arguments of the model, such as ``depth``, for tests with random weights.

    Raises:
        BackboneError: if timm does not know the name, or the model is not a plain ViT.
    """
    architecture = name.split(".")[0]
    if architecture not in timm.list_models():
        similar = ", ".join(difflib.get_close_matches(architecture, timm.list_models(), n=3))
        raise BackboneError(
            f"timm {timm.__version__} has no model {name!r}"
            + (f"; similar: {similar}" if similar else "")
            + ". `dvit models` lists the published ones; any other module can be given with its patch size"
        )
    flexible = model_entrypoint(architecture).__module__ == NaFlexVit.__module__  # supports any size
    options: dict[str, Any] = changes if flexible else changes | {"dynamic_img_size": True}
    try:
        with seeded(0):  # timm draws initial weights from the global generator
            model = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except TypeError as error:  # the architecture does not have this option
        raise BackboneError(f"{name} is not a plain ViT (no dynamic_img_size): {error}") from error
    except RuntimeError as error:
        if pretrained and "tag" not in str(error):
            raise
        raise BackboneError(f"timm could not build {name!r}: {error}") from error
    if not isinstance(model, TimmViT):
        raise BackboneError(
            f"{name} is a {type(model).__name__}; expected a VisionTransformer, Eva or NaFlexVit with patch tokens. "
            "To use it, wrap it: load_backbone(module, patch_size=...)"
        )
    return model.eval().requires_grad_(False)


def any_size(model: TimmViT) -> TimmViT:
    """A view of a timm model that supports any image size; weights are shared, and the model is unchanged.

    Raises:
        BackboneError: if its rotary positions are fixed to one size.
    """
    if isinstance(model, NaFlexVit) or model.dynamic_img_size:
        return model
    if isinstance(model, Eva):
        raise BackboneError(
            "this Eva model has rotary positions for one image size only; build it with "
            "timm.create_model(..., dynamic_img_size=True)"
        )
    view = shallow(model)
    embed = shallow(view.patch_embed)
    embed.strict_img_size, embed.flatten, embed.output_fmt = False, False, Format.NHWC
    view.patch_embed, view.dynamic_img_size = embed, True
    return view


def timm_name(model: TimmViT) -> str:
    """The timm name of a model, with the tag of its weights."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    name, tag = config.get("architecture") or type(model).__name__, config.get("tag")
    return f"{name}.{tag}" if tag else str(name)


def edit_intermediates(
    found: Any, patches: Callable[[Tensor, int], Tensor], final: Callable[[Tensor], Tensor] | None
) -> Any:
    """Edit the output of timm's ``forward_intermediates``.

    Args:
        found: a list; (final tokens, list); or a dictionary. The list has patch tokens, or pairs of patch and prefix
            tokens.
        patches: maps patch tokens and their index in the list to new patch tokens.
        final: maps the final tokens, prefix first, to new ones; None keeps them.
    """

    def listed(entries: list[Any]) -> list[Any]:
        return [
            (patches(entry[0], number), *entry[1:]) if isinstance(entry, tuple) else patches(entry, number)
            for number, entry in enumerate(entries)
        ]

    if isinstance(found, dict):
        edited = found | {"image_intermediates": listed(found["image_intermediates"])}
        if final is not None and "image_features" in found:
            edited["image_features"] = final(found["image_features"])
        return edited
    if isinstance(found, tuple):
        tokens, entries = found
        return (tokens if final is None else final(tokens)), listed(entries)
    return listed(found)


def _square_patch(model: TimmViT, name: str) -> int:
    embed: Any = model.embeds if isinstance(model, NaFlexVit) else model.patch_embed
    patch, proj = getattr(embed, "patch_size", None), getattr(embed, "proj", None)
    if isinstance(proj, nn.Conv2d):
        channels = proj.in_channels
    elif isinstance(proj, nn.Linear) and isinstance(model, NaFlexVit) and patch is not None:
        channels = proj.in_features // (patch[0] * patch[1])
    else:
        channels = 0
    if channels != 3 or patch is None or patch[0] != patch[1]:
        raise BackboneError(f"{name} does not divide the image into square patches ({type(embed).__name__})")
    return int(patch[0])
