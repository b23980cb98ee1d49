"""A directory that plain timm loads: ``timm.create_model("local-dir:PATH", pretrained=True)``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from denoising_vit.backbones import Backbone
from denoising_vit.backbones.timm_vit import TimmBackbone
from denoising_vit.errors import ExportError
from denoising_vit.export.tensors import float_state
from denoising_vit.files import write_tensors

WEIGHTS, CONFIG = "model.safetensors", "config.json"

#: What timm knows of a model's weights that stays true of ours.
_KEPT = ("interpolation", "crop_pct", "crop_mode", "input_size", "fixed_input_size", "first_conv", "classifier")


def plain_timm(backbone: Backbone, kind: str) -> TimmBackbone:
    """The backbone, if a checkpoint of plain weights gives its features.

    Raises:
        ExportError: if it is no timm model, or layer, norm or stride are not the model's own.
    """
    if not isinstance(backbone, TimmBackbone):
        raise ExportError(
            f"{kind} is for models of timm, got {backbone.name} ({type(backbone).__name__}); use onnx or program"
        )
    own = (backbone.layer == (backbone.depth or 0) - 1, backbone.norm, backbone.stride == backbone.patch_size)
    if not all(own):
        raise ExportError(
            f"{kind} holds weights only, not which layer is taken, how it is normalised or how far patches are apart: "
            f"expected the last layer, the final norm and stride {backbone.patch_size}, got layer {backbone.layer}, "
            f"norm {backbone.norm} and stride {backbone.stride}; use onnx or program"
        )
    return backbone


def write_timm(backbone: Backbone, folder: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes weights under timm's names, with metadata, and the configuration that timm builds the model from.

    Raises:
        ExportError: if a timm checkpoint cannot hold the backbone.
    """
    model = plain_timm(backbone, "timm").model
    write_tensors(float_state(model), folder / WEIGHTS, {"format": "pt"} | (metadata or {}))
    known: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
    pretrained = {key: known[key] for key in _KEPT if known.get(key) is not None}
    pretrained |= {"mean": backbone.mean, "std": backbone.std, "num_classes": 0, "custom_load": False}
    architecture, _, tag = backbone.name.partition(".")
    pretrained |= {"tag": tag} if tag else {}
    grid: Any = model.patch_embed.grid_size
    # Without it timm may build another position embedding, and resample ours to it without a word.
    own = [int(side) * backbone.patch_size for side in grid]
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "model_args": {"dynamic_img_size": True, "img_size": own},
        "pretrained_cfg": pretrained,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
