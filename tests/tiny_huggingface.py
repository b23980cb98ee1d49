"""Shared by the tests of Hugging Face models: tiny ones of every family, in directories laid out as on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

PATCH, SIDE, WIDTH, DEPTH = 8, 32, 32, 3  # a position embedding of 4 x 4

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)

PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": MEAN,
    "image_std": STD,
}

#: By ``model_type``: prefix tokens, and the classes of configuration and model.
FAMILIES: dict[str, tuple[int, str, str]] = {
    "dinov2": (1, "Dinov2Config", "Dinov2Model"),
    "dinov2_with_registers": (5, "Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"),
    "dinov3_vit": (5, "DINOv3ViTConfig", "DINOv3ViTModel"),
    "vit": (1, "ViTConfig", "ViTModel"),
    "deit": (2, "DeiTConfig", "DeiTModel"),
    "clip_vision_model": (1, "CLIPVisionConfig", "CLIPVisionModel"),
    "siglip_vision_model": (0, "SiglipVisionConfig", "SiglipVisionModel"),
}


def config(kind: str, **changes: Any) -> Any:
    values: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
    values |= {"image_size": SIDE, "patch_size": PATCH, "num_channels": 3, "initializer_range": 0.3}
    if "dinov2" not in kind:
        values["intermediate_size"] = 2 * WIDTH
    if kind == "dinov3_vit":
        values["num_register_tokens"] = 4
    return getattr(transformers, FAMILIES[kind][1])(**(values | changes))


def model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """Random weights that all have an effect: position embeddings, registers and norms as well."""
    torch.manual_seed(seed)
    made = getattr(transformers, FAMILIES[kind][2])(config(kind, **changes)).eval().requires_grad_(False)
    for value in made.parameters():
        value.add_(torch.randn_like(value) * 0.05)
    return made


def write(folder: Path, kind: str, *, processor: dict[str, Any] | None = None, **changes: Any) -> Any:
    """Writes a directory with configuration, weights and image processor; returns the model."""
    made = model(kind, **changes)
    made.save_pretrained(folder)
    write_processor(folder, processor or {})
    return made


def write_processor(folder: Path, changes: dict[str, Any]) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | changes))


def edit_config(folder: Path, *, without: tuple[str, ...] = (), **changes: Any) -> None:
    path = folder / "config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps(kept | changes))
