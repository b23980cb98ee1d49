"""The specification of a backbone, from which another process can load the same backbone. No heavy imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from denoising_vit.backbones.catalog import Dtype

if TYPE_CHECKING:
    from denoising_vit.backbones.base import Backbone


@dataclass(frozen=True)
class BackboneSpec:
    """Backbone options; another process can load the same backbone from them.

    Attributes:
        backbone: any timm VisionTransformer, Eva or NaFlexVit (`dvit models` lists the published ones); hf:ID or
            hf:PATH for a ViT of Hugging Face transformers; or a directory written by `dvit export`.
        weights: auto (the bundled weights if installed, else the hub), hub, bundled, random, distilled (the package's
            own, which give clean features), or a .safetensors or .pth file.
        stride: distance between patches in pixels; below the patch size for a finer grid.
        layer: output block, negative from the end.
        norm: apply the model's final norm.
        device: auto, cpu, cuda, cuda:1, mps.
        dtype: auto is bfloat16 if the hardware is fast at it, else float32.
    """

    backbone: str = "vit_small_patch14_dinov2.lvd142m"
    weights: str = "auto"
    stride: int | None = None
    layer: int = -1
    norm: bool = True
    device: str = "auto"
    dtype: Dtype = "auto"

    def load(self) -> Backbone:
        """Load the backbone.

        Raises:
            BackboneError: if the model cannot be built.
            WeightsError: if the weights are missing, for another model, or not finite.
        """
        from denoising_vit.backbones.loading import load_backbone

        return load_backbone(
            self.backbone,
            weights=self.weights,
            stride=self.stride,
            layer=self.layer,
            norm=self.norm,
            dtype=self.dtype,
            device=self.device,
        )
