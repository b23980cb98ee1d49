"""Models the method was published for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Seed:
    """One published model.

    Attributes:
        family: how it was pretrained.
        patch_size: side of a patch in pixels.
        size: side of the images that features are taken from.
        in_paper: whether the paper names it (the others are in the published code only).
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
