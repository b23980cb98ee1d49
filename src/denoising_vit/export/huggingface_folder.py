"""DINOv2, with and without registers, from timm's names to a directory that transformers loads.

Files are those of the hub: names of tensors as in the published checkpoints, which every version of transformers reads,
whatever it calls them itself.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from timm.layers.mlp import GluMlp, Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from denoising_vit.backbones import Backbone
from denoising_vit.errors import ExportError
from denoising_vit.export.tensors import float_state
from denoising_vit.export.timm_folder import CONFIG, WEIGHTS, plain_timm
from denoising_vit.files import write_tensors

PROCESSOR = "preprocessor_config.json"

_BICUBIC = 3  # Pillow's number


def write_huggingface(backbone: Backbone, folder: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes configuration, weights with metadata, and image processor of ``Dinov2Model``, or of that with registers.

    The image processor shows photos as this package does: whole, squeezed to the model's own size, never cropped.

    Raises:
        ExportError: if the model is no DINOv2, or layer, norm or stride are not the model's own.
    """
    model = plain_timm(backbone, "huggingface").model
    config = dinov2_config(model, backbone.name)
    write_tensors(dinov2_state(model), folder / WEIGHTS, {"format": "pt"} | (metadata or {}))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    size = {"height": backbone.default_size, "width": backbone.default_size}
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": _BICUBIC,
        "do_center_crop": False,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": backbone.mean,
        "image_std": backbone.std,
    }
    (folder / PROCESSOR).write_text(json.dumps(processor, indent=2) + "\n")


def own_side(backbone: Backbone) -> int:
    """Side in pixels of the images whose patches are as many as the position embedding's: nothing is resampled there.

    transformers resamples DINOv2's without antialiasing, timm with it, so elsewhere features differ.
    """
    grid: Any = plain_timm(backbone, "huggingface").model.patch_embed.grid_size
    return int(grid[0]) * backbone.patch_size


def dinov2_config(model: Any, name: str) -> dict[str, Any]:
    """``config.json`` of a timm DINOv2.

    Raises:
        ExportError: if the model is built in another way, saying in which.
    """
    if differs := _not_dinov2(model):
        raise ExportError(
            f"huggingface is for DINOv2, with or without registers; {name} {differs}. Use timm, onnx or program"
        )
    block, registers = model.blocks[0], int(model.num_reg_tokens)
    swiglu = isinstance(block.mlp, GluMlp)
    config: dict[str, Any] = {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "dtype": "float32",
        "torch_dtype": "float32",
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "mlp_ratio": 4 if swiglu else block.mlp.fc1.out_features // model.embed_dim,
        "hidden_act": "gelu",
        "use_swiglu_ffn": swiglu,
        "layer_norm_eps": model.norm.eps,
        "layerscale_value": 1.0,
        "image_size": model.patch_embed.grid_size[0] * model.patch_embed.patch_size[0],
        "patch_size": model.patch_embed.patch_size[0],
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "initializer_range": 0.02,
    }
    return config | ({"num_register_tokens": registers} if registers else {})


def dinov2_state(model: Any) -> dict[str, Tensor]:
    """A timm state dict under the names of the published DINOv2 of transformers."""
    own = float_state(model)
    positions = own["pos_embed"]
    if model.no_embed_class:  # the class token's place is in the token itself
        positions = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    state = {
        "embeddings.cls_token": own["cls_token"],
        "embeddings.mask_token": torch.zeros(1, model.embed_dim),
        "embeddings.position_embeddings": positions,
        "embeddings.patch_embeddings.projection.weight": own["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": own["patch_embed.proj.bias"],
        "layernorm.weight": own["norm.weight"],
        "layernorm.bias": own["norm.bias"],
    }
    if model.num_reg_tokens:
        state["embeddings.register_tokens"] = own["reg_token"]
    for index in range(len(model.blocks)):
        state |= _block(index, own)
    return {key: value.contiguous() for key, value in state.items()}


def _block(index: int, own: dict[str, Tensor]) -> dict[str, Tensor]:
    ours, theirs = f"blocks.{index}.", f"encoder.layer.{index}."
    state = {f"{theirs}layer_scale{number}.lambda1": own[f"{ours}ls{number}.gamma"] for number in (1, 2)}
    swiglu = len(own[f"{ours}mlp.fc1.weight"]) != own[f"{ours}mlp.fc2.weight"].shape[1]  # two halves, one a gate
    layers = {"fc1": "weights_in", "fc2": "weights_out"} if swiglu else {"fc1": "fc1", "fc2": "fc2"}
    for part in ("weight", "bias"):
        for number in (1, 2):
            state[f"{theirs}norm{number}.{part}"] = own[f"{ours}norm{number}.{part}"]
        for name, value in zip(("query", "key", "value"), own[f"{ours}attn.qkv.{part}"].chunk(3), strict=True):
            state[f"{theirs}attention.attention.{name}.{part}"] = value.clone()
        state[f"{theirs}attention.output.dense.{part}"] = own[f"{ours}attn.proj.{part}"]
        for name, named in layers.items():
            state[f"{theirs}mlp.{named}.{part}"] = own[f"{ours}mlp.{name}.{part}"]
    return state


def _not_dinov2(model: Any) -> str | None:
    """In what a model is built otherwise than DINOv2; None for one of its kind."""
    if not isinstance(model, VisionTransformer):
        return f"is a {type(model).__name__}"
    block: Any = model.blocks[0]
    h, w = model.patch_embed.grid_size or (0, 1)
    swiglu = isinstance(block.mlp, GluMlp)
    hidden = block.mlp.fc2.in_features
    # transformers derives the hidden width of a gated layer from that of a plain one.
    expected = (
        (int(model.embed_dim * 4 * 2 / 3) + 7) // 8 * 8 if swiglu else hidden // model.embed_dim * model.embed_dim
    )
    wrong = {
        "has no class token": model.cls_token is None,
        "has no position embedding of a square grid": model.pos_embed is None or h != w,
        "has no layer scale": not hasattr(block.ls1, "gamma"),
        "has another final norm": not isinstance(model.norm, nn.LayerNorm),
        "is normalised before its blocks": not isinstance(model.norm_pre, nn.Identity),
        "has attention without bias": block.attn.qkv.bias is None,
        "normalises queries and keys": not isinstance(getattr(block.attn, "q_norm", nn.Identity()), nn.Identity),
        "has another kind of layer after attention": not isinstance(block.mlp, Mlp | GluMlp),
        "has other activations": not isinstance(block.mlp.act, nn.SiLU if swiglu else nn.GELU),
        "has layers of another width": not math.isclose(hidden, expected),
    }
    return next((what for what, is_so in wrong.items() if is_so), None)
