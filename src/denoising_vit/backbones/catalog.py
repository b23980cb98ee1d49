"""Published models, supported families of models, and the specification of one to load. No heavy imports."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from denoising_vit.backbones.base import Backbone

#: Floating-point types by name; `auto` is bfloat16 if the hardware is fast at it, else float32.
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Seed:
    """One published model.

    Attributes:
        family: pretraining.
        patch_size: side of a patch in pixels.
        size: side of the images in pixels.
        in_paper: True if the paper mentions it; other models are only in the published code.
    """

    family: str
    patch_size: int
    size: int
    in_paper: bool


def _seed(family: str, patch_size: int, in_paper: bool = True) -> Seed:
    return Seed(family, patch_size, 518 if patch_size == 14 else 512, in_paper)


SEEDS: dict[str, Seed] = {
    "vit_small_patch14_dinov2.lvd142m": _seed("DINOv2", 14),
    "vit_base_patch14_dinov2.lvd142m": _seed("DINOv2", 14),
    "vit_large_patch14_dinov2.lvd142m": _seed("DINOv2", 14),
    "vit_small_patch14_reg4_dinov2.lvd142m": _seed("DINOv2 with registers", 14),
    "vit_base_patch14_reg4_dinov2.lvd142m": _seed("DINOv2 with registers", 14),
    "vit_large_patch14_reg4_dinov2.lvd142m": _seed("DINOv2 with registers", 14),
    "deit3_base_patch16_224.fb_in1k": _seed("DeiT-III", 16),
    "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k": _seed("CLIP, fine-tuned", 16),
    "vit_base_patch16_224.dino": _seed("DINO", 16),
    "vit_base_patch16_224.mae": _seed("MAE", 16),
    "eva02_base_patch16_clip_224.merged2b": _seed("EVA-02 CLIP", 16),
    "vit_base_patch16_384.augreg_in21k_ft_in1k": _seed("supervised", 16),
    "vit_small_patch8_224.dino": _seed("DINO", 8, in_paper=False),
    "vit_small_patch16_224.dino": _seed("DINO", 16, in_paper=False),
    "vit_base_patch8_224.dino": _seed("DINO", 8, in_paper=False),
    "vit_giant_patch14_dinov2.lvd142m": _seed("DINOv2", 14, in_paper=False),
    "vit_giant_patch14_reg4_dinov2.lvd142m": _seed("DINOv2 with registers", 14, in_paper=False),
    "vit_large_patch16_224.mae": _seed("MAE", 16, in_paper=False),
    "vit_huge_patch14_224.mae": _seed("MAE", 14, in_paper=False),
    "vit_base_patch16_clip_224.openai": _seed("CLIP", 16, in_paper=False),
}


@dataclass(frozen=True)
class ModelFamily:
    """A family of models, and whether it is supported as a backbone.

    Attributes:
        name: name of the family.
        example: smallest timm name, or a Hugging Face id.
        loads: True if ``load_backbone`` supports it by name.
        note: kind of positions and prefix tokens; for unsupported families, the reason and a workaround.
    """

    name: str
    example: str
    loads: bool
    note: str


#: Families by the classes of the installed timm and by `model_type` of transformers; tests build each one.
MODEL_FAMILIES: tuple[ModelFamily, ...] = (
    ModelFamily("ViT, DINO, MAE, CLIP, DeiT", "vit_tiny_patch16_224", True, "learned positions, class token"),
    ModelFamily("DINOv2", "vit_small_patch14_reg4_dinov2", True, "learned positions, class token, 0 or 4 registers"),
    ModelFamily("DINOv3, EUPE", "vit_small_patch16_dinov3", True, "rotary positions, class token, 4 registers"),
    ModelFamily("SigLIP, SigLIP 2", "vit_base_patch16_siglip_224", True, "learned positions, no prefix tokens"),
    ModelFamily("SigLIP 2 NaFlex", "naflexvit_base_patch16_siglip", True, "learned positions, no prefix tokens"),
    ModelFamily("C-RADIO v3, v4", "naflexvit_base_patch16_radio_v3", True, "learned positions, 8 prefix tokens"),
    ModelFamily("TIPSv2", "vit_base_patch14_reg1_tipsv2", True, "learned positions, class token, 1 register"),
    ModelFamily("PE-Spatial, PE-Core", "vit_pe_spatial_tiny_patch16_512", True, "rotary and learned positions"),
    ModelFamily("AIMv2", "aimv2_large_patch14_224", True, "learned positions, no prefix tokens, RMS norm"),
    ModelFamily("EVA-02", "eva02_tiny_patch14_224", True, "rotary and learned positions, class token"),
    ModelFamily("BEiT-3", "beit3_base_patch16_224", True, "learned positions, class token"),
    ModelFamily("Hugging Face", "hf:facebook/dinov2-small", True, "DINOv2, DINOv3, ViT, DeiT, CLIP, SigLIP"),
    ModelFamily("Hiera", "hiera_tiny_224", False, "grids of several stages: wrap forward_features with patch_size=32"),
    ModelFamily("BEiT, BEiT v2", "beit_base_patch16_224", False, "one size only: wrap with patch_size=16"),
    ModelFamily("ViT with relative positions", "vit_relpos_small_patch16_224", False, "one size only: wrap it"),
    ModelFamily("SAM", "samvit_base_patch16", False, "windows of one size: wrap forward_features with patch_size=16"),
    ModelFamily("Hybrid ViT", "vit_small_r26_s32_224", False, "patches of a ResNet: wrap forward_features"),
    ModelFamily("Swin, XCiT, CaiT, ConvNeXt", "swin_tiny_patch4_window7_224", False, "not a plain ViT: wrap it"),
)


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

        options = {each.name: getattr(self, each.name) for each in fields(BackboneSpec)}
        return load_backbone(options.pop("backbone"), **options)
