"""Backbones from Hugging Face transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from denoising_vit.backbones.base import Backbone
from denoising_vit.errors import BackboneError


@dataclass(frozen=True)
class Family:
    """Differences between the model families of transformers.

    Attributes:
        model: name of the class in transformers that returns the tokens.
        norm: name of the final norm in the model.
        normed: True if the returned tokens are normalised.
        resamples: True if it supports ``interpolate_pos_encoding``, and needs it for other image sizes.
        class_tokens: number of tokens before registers and patches.
        build: further arguments of the class.
        config: values to set in the configuration, to omit parts that dense features do not use.
    """

    model: str
    norm: str
    normed: bool = True
    resamples: bool = False
    class_tokens: int = 1
    build: tuple[tuple[str, Any], ...] = ()
    config: tuple[tuple[str, Any], ...] = ()

    def prefix_tokens(self, config: Any) -> int:
        """Number of tokens before the patch tokens."""
        return self.class_tokens + getattr(config, "num_register_tokens", 0)


_UNPOOLED = (("add_pooling_layer", False),)
_CLIP = Family("CLIPVisionModel", "post_layernorm", normed=False, resamples=True)
_SIGLIP = Family(
    "SiglipVisionModel", "post_layernorm", resamples=True, class_tokens=0, config=(("vision_use_head", False),)
)

#: By ``model_type``. Models with a text tower keep the image tower's configuration in ``vision_config``.
FAMILIES: dict[str, Family] = {
    "dinov2": Family("Dinov2Model", "layernorm"),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", "layernorm"),
    "dinov3_vit": Family("DINOv3ViTModel", "norm"),
    "vit": Family("ViTModel", "layernorm", resamples=True, build=_UNPOOLED),
    "deit": Family("DeiTModel", "layernorm", resamples=True, class_tokens=2, build=_UNPOOLED),
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
}


@dataclass(frozen=True)
class Shown:
    """Images that a model expects: mean and deviation of their normalisation, and side in pixels of square ones."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: int


class HuggingFaceBackbone(Backbone):
    """A ViT of transformers. Its position embedding is resampled as in transformers, not as in timm.

    Raises:
        BackboneError: if the layer does not exist, or patches are not square.
    """

    def __init__(
        self, model: nn.Module, family: Family, shown: Shown, *, name: str, layer: int, norm: bool, weights: str
    ) -> None:
        config: Any = model.config
        patch_size = square_side(config.patch_size, f"{name}: patch_size")
        super().__init__(
            name=name,
            patch_size=patch_size,
            stride=patch_size,
            embed_dim=int(config.hidden_size),
            mean=shown.mean,
            std=shown.std,
            default_size=shown.size,
            layer=layer,
            norm=norm,
            weights=weights,
            depth=int(config.num_hidden_layers),
        )
        self.model = model
        self.family = family
        self._prefix = family.prefix_tokens(config)

    def _tokens(self, image: Tensor) -> tuple[Tensor, Tensor]:
        if self.layer != (self.depth or 0) - 1 or not self.norm:
            return self._intermediate_tokens(image, ())[0]
        tokens = self._run(image).last_hidden_state  # does not keep other blocks' outputs in memory
        return self._split(tokens if self.family.normed else self._final_norm(tokens))

    def _intermediate_tokens(self, image: Tensor, blocks: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        states = self._run(image, output_hidden_states=True).hidden_states  # embeddings first, then one per block
        assert self.layer is not None
        tokens = [states[block + 1] for block in (self.layer, *blocks)]
        return [self._split(self._final_norm(part) if self.norm else part) for part in tokens]

    def _run(self, image: Tensor, **more: Any) -> Any:
        sizes = {"interpolate_pos_encoding": True} if self.family.resamples else {}
        return self.model(pixel_values=image, **sizes, **more)

    def _final_norm(self, tokens: Tensor) -> Tensor:
        return self.model.get_submodule(self.family.norm)(tokens)

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return tokens[:, self._prefix :], tokens[:, : self._prefix]

    def _fingerprint_size(self) -> int:
        return 8 * self.patch_size  # as for timm; the model supports any size


def square_side(given: Any, what: str) -> int:
    """Side of a square that a configuration gives as one or two numbers.

    Raises:
        BackboneError: if the numbers differ or are not positive integers.
    """
    sides = list(given) if isinstance(given, list | tuple) else [given, given]
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
    if len(sides) != 2 or not whole or sides[0] != sides[1]:
        raise BackboneError(f"{what} must be a positive whole number, or two equal ones, got {given!r}")
    return sides[0]
