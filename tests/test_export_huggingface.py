"""DINOv2 from timm to Hugging Face: a directory that AutoModel loads, with the same features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import denoising_vit as dv
import tiny_export as tiny
from denoising_vit import ExportError, ExportOptions, export_extractor, verify_export
from denoising_vit.backbones.timm_vit import TimmBackbone
from denoising_vit.export import verification

pytestmark = pytest.mark.usefixtures("one_thread")

FORM = ExportOptions(format="huggingface")

BUILDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"registers": 3},
    "gated": {"swiglu": True},
    "gated with registers": {"swiglu": True, "registers": 2},
    "wider": {"mlp_ratio": 2},
}


@pytest.mark.parametrize("build", BUILDS)
def test_automodel_gives_the_same_tokens(tmp_path: Path, build: str) -> None:
    backbone = tiny.dinov2(**BUILDS[build])
    found = export_extractor(backbone, tmp_path / "out", FORM)
    assert found.difference < 1e-5
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    registers = BUILDS[build].get("registers", 0)
    assert type(model).__name__ == ("Dinov2WithRegistersModel" if registers else "Dinov2Model")
    image = tiny.picture(56, 56, 2)
    features, prefix = backbone.forward_with_prefix(image)
    tokens = model(pixel_values=image).last_hidden_state
    assert tokens.shape == (2, 1 + registers + 16, 32)
    assert torch.allclose(tokens, torch.cat([prefix, features.flatten(1, 2)], dim=1), atol=1e-5)


def test_only_models_with_registers_match_at_other_sizes(tmp_path: Path) -> None:
    """transformers antialiases the position embedding of these, as timm does, but not that of plain DINOv2."""
    for registers, same in ((3, True), (0, False)):
        backbone = tiny.dinov2(registers=registers)
        out = tmp_path / str(registers)
        export_extractor(backbone, out, FORM)
        again = dv.load_backbone(str(out), dtype="float32", device="cpu")
        image = tiny.picture(28, 98)
        assert torch.allclose(again(image), backbone(image), atol=1e-4) is same
        assert again.default_size == 56
        elsewhere = json.loads((out / "export.json").read_text())["check"]["elsewhere"]
        assert (elsewhere["cosine"] > 0.99999) is same
        assert ("without antialiasing" in (out / "README.md").read_text()) is not same


def test_image_processor_does_not_crop_photos(tmp_path: Path) -> None:
    backbone = tiny.dinov2()
    export_extractor(backbone, tmp_path / "out", FORM)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    photo = np.zeros((60, 90, 3), np.uint8)
    photo[:, :45] = 255  # the left half is white, to the very edge
    pixels = processor(photo, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 56, 56)
    mean, std = (torch.tensor(values).view(3, 1) for values in (backbone.mean, backbone.std))
    assert torch.allclose(pixels[0, :, :, 2], ((1 - mean) / std).expand(3, 56), atol=1e-4)
    assert torch.allclose(pixels[0, :, :, -3], (-mean / std).expand(3, 56), atol=1e-4)


def test_tensors_are_named_as_on_the_hub(tmp_path: Path) -> None:
    export_extractor(tiny.dinov2(registers=3), tmp_path / "out", FORM)
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    first = {name.removeprefix("encoder.layer.0.") for name in names if name.startswith("encoder.layer.0.")}
    linear = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
    linear += ("attention.output.dense", "mlp.fc1", "mlp.fc2", "norm1", "norm2")
    expected = {f"{name}.{part}" for name in linear for part in ("weight", "bias")}
    assert first == expected | {"layer_scale1.lambda1", "layer_scale2.lambda1"}
    tokens = ("cls_token", "mask_token", "register_tokens", "position_embeddings")
    assert {f"embeddings.{name}" for name in tokens} < names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_values": None}, "has no layer scale"),
        ({"pre_norm": True}, "is normalised before its blocks"),
        ({"qkv_bias": False}, "has attention without bias"),
        ({"qk_norm": True}, "normalises queries and keys"),
        ({"act_layer": nn.ReLU}, "has other activations"),
        ({"mlp_ratio": 2.5}, "has layers of another width"),
        ({"class_token": False, "global_pool": "avg"}, "has no class token"),
        ({"img_size": (56, 70)}, "has no position embedding of a square grid"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_models_unlike_dinov2_are_rejected(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=f"huggingface supports DINOv2.*vit_small_patch14_dinov2 {message}"):
        export_extractor(tiny.dinov2(**change), tmp_path / "out", FORM)
    assert list(tmp_path.iterdir()) == []


def test_eva_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="eva02_tiny_patch14_224 is a Eva"):
        export_extractor(tiny.backbone("eva02_tiny_patch14_224"), tmp_path / "out", FORM)


def test_directory_that_transformers_cannot_load_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(folder: Path) -> None:
        raise ValueError("no such thing\nmore")

    monkeypatch.setattr(verification, "_huggingface", damaged)
    with pytest.raises(ExportError, match=r"could not be loaded \(ValueError: no such thing\)"):
        export_extractor(tiny.dinov2(), tmp_path / "out", FORM)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def bundled() -> TimmBackbone:
    found = dv.load_backbone("vit_small_patch14_dinov2.lvd142m", weights="bundled", dtype="float32", device="cpu")
    assert isinstance(found, TimmBackbone)
    return found


@pytest.mark.slow
def test_the_bundled_dinov2_has_the_same_features_in_transformers(bundled: TimmBackbone, tmp_path: Path) -> None:
    found = export_extractor(bundled, tmp_path / "out", FORM)
    assert found.difference < 1e-4
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    assert type(model).__name__ == "Dinov2Model"
    image = tiny.picture(518, 518)
    features, prefix = bundled.forward_with_prefix(image)
    with torch.no_grad():
        tokens = model(pixel_values=image).last_hidden_state
    assert float((tokens[:, 1:].unflatten(1, (37, 37)) - features).abs().max()) < 1e-4
    assert float((tokens[:, :1] - prefix).abs().max()) < 1e-4
    again = dv.load_backbone(f"hf:{tmp_path / 'out'}", dtype="float32", device="cpu")
    assert (again.mean, again.std, again.default_size) == (bundled.mean, bundled.std, 518)
    assert verify_export(tmp_path / "out").problems == ()
