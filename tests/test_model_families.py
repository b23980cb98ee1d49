"""Model families: small models with random weights, each with the right patch grid."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch

import denoising_vit as dv
from command import in_process
from denoising_vit.backbones.catalog import MODEL_FAMILIES
from denoising_vit.backbones.timm_vit import TimmBackbone, build_timm_model

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 2}

#: Number of prefix tokens and patch size of each example.
EXPECTED = {
    "vit_tiny_patch16_224": (1, 16),
    "vit_small_patch14_reg4_dinov2": (5, 14),
    "vit_small_patch16_dinov3": (5, 16),
    "vit_base_patch16_siglip_224": (0, 16),
    "naflexvit_base_patch16_siglip": (0, 16),
    "naflexvit_base_patch16_radio_v3": (8, 16),
    "vit_base_patch14_reg1_tipsv2": (2, 14),
    "vit_pe_spatial_tiny_patch16_512": (1, 16),
    "aimv2_large_patch14_224": (0, 14),
    "eva02_tiny_patch14_224": (1, 14),
    "beit3_base_patch16_224": (1, 16),
}


def test_every_timm_example_is_tested() -> None:
    assert {family.example for family in MODEL_FAMILIES if family.loads and ":" not in family.example} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_features_of_each_family_are_on_the_patch_grid(name: str) -> None:
    prefix, patch = EXPECTED[name]
    model = build_timm_model(name, pretrained=False, **SMALL)
    backbone = TimmBackbone(model, name=name, stride=None, layer=-1, norm=True, weights="random")
    assert backbone.patch_size == patch
    image = torch.randn(2, 3, 4 * patch, 7 * patch, generator=torch.Generator().manual_seed(0))
    features, beside = backbone.forward_with_prefix(image)
    assert features.shape == (2, 4, 7, 64)
    assert beside.shape == (2, prefix, 64)
    # Changing one patch changes its own features the most.
    changed = image.clone()
    changed[:, :, patch : 2 * patch, 5 * patch : 6 * patch] += 1
    moved = (backbone(changed) - features).norm(dim=-1)
    assert moved[0].argmax() == 7 * 1 + 5
    cleaned = dv.clean(copy.deepcopy(backbone), "average", passes=2)
    assert cleaned(image).shape == features.shape


@pytest.mark.parametrize("name", [family.example for family in MODEL_FAMILIES if not family.loads])
def test_other_families_are_rejected_with_a_reason(name: str) -> None:
    with pytest.raises(dv.BackboneError, match=r"not a plain ViT|does not divide|expected a VisionTransformer"):
        TimmBackbone(
            build_timm_model(name, pretrained=False), name=name, stride=None, layer=-1, norm=True, weights="random"
        )


def test_hiera_is_wrapped_at_its_last_stage() -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("hiera_tiny_224", num_classes=0).eval()
    backbone = dv.load_backbone(model.forward_features, patch_size=32, default_size=224)
    assert backbone(torch.randn(1, 3, 224, 224)).shape == (1, 7, 7, 768)


def test_models_lists_the_families(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    printed = in_process(capsys, monkeypatch)("models", "--all")
    assert printed.code == 0
    assert all(family.example.split("_")[0] in printed.out for family in MODEL_FAMILIES)
