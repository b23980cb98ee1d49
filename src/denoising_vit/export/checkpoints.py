"""Checkpoints: plain weights for timm (``local-dir:PATH``), DINOv2 for transformers, and extractor files.

Those for transformers use the tensor names of the published checkpoints, which every version of it reads. An extractor
file has a backbone with its denoiser, projection or G in one safetensors file, for this package.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import torch
from timm.layers.mlp import GluMlp, Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from denoising_vit.artifact import Artifact
from denoising_vit.backbones import Backbone
from denoising_vit.backbones.catalog import Dtype
from denoising_vit.backbones.runtime import device_at, dtype_on
from denoising_vit.backbones.timm_vit import TimmBackbone, build_timm_model
from denoising_vit.backbones.weights import load_weights, require_finite
from denoising_vit.denoiser import Denoiser
from denoising_vit.denoiser.denoised_vit import DenoisedViT
from denoising_vit.errors import DenoisingVitError, ExportError, FormatError
from denoising_vit.files import KEY, below, open_own, write_tensors
from denoising_vit.training_free.project import Subspace

WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"

#: Fields of timm's pretrained configuration that remain valid.
_KEPT = ("interpolation", "crop_pct", "crop_mode", "input_size", "fixed_input_size", "first_conv", "classifier")

_BICUBIC = 3  # Pillow's constant

#: ``format`` and version in the record of an extractor file.
FORMAT, FORMAT_VERSION = "denoising-vit/extractor", 1

#: Names of an extractor file's tensors, or prefixes of them.
_BACKBONE, _DENOISER, _ARTIFACT, _SUBSPACE = "backbone.", "denoiser.", "artifact", "subspace"


def float_state(module: nn.Module) -> dict[str, Tensor]:
    """A state dict in float32 on the CPU, without shared memory, as safetensors requires."""
    return {key: value.detach().float().cpu().clone().contiguous() for key, value in module.state_dict().items()}


def plain_timm(backbone: Backbone, kind: str) -> TimmBackbone:
    """The backbone, if a checkpoint of plain weights reproduces its features.

    Raises:
        ExportError: if it is not a timm model, or layer, norm or stride are not the model's own.
    """
    if not isinstance(backbone, TimmBackbone):
        raise ExportError(
            f"{kind} supports models of timm, got {backbone.name} ({type(backbone).__name__}); use onnx or program"
        )
    own = (backbone.layer == (backbone.depth or 0) - 1, backbone.norm, backbone.stride == backbone.patch_size)
    if not all(own):
        raise ExportError(
            f"{kind} stores only weights, not the layer, norm or stride: expected the last layer, the final norm and "
            f"stride {backbone.patch_size}, got layer {backbone.layer}, norm {backbone.norm} and stride "
            f"{backbone.stride}; use onnx or program"
        )
    return backbone


def write_timm(backbone: Backbone, folder: Path, metadata: dict[str, str] | None = None) -> None:
    """Write weights with timm's names and metadata, and the configuration from which timm builds the model.

    Raises:
        ExportError: if a timm checkpoint cannot represent the backbone.
    """
    model: Any = plain_timm(backbone, "timm").model
    write_tensors(float_state(model), folder / WEIGHTS, {"format": "pt"} | (metadata or {}))
    known: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
    pretrained = {key: known[key] for key in _KEPT if known.get(key) is not None}
    pretrained |= {"mean": backbone.mean, "std": backbone.std, "num_classes": 0, "custom_load": False}
    architecture, _, tag = backbone.name.partition(".")
    pretrained |= {"tag": tag} if tag else {}
    grid = model.patch_embed.grid_size
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        # Without img_size, timm may build another position embedding and silently resample the weights to it.
        "model_args": {"dynamic_img_size": True, "img_size": [int(side) * backbone.patch_size for side in grid]},
        "pretrained_cfg": pretrained,
    }
    _write_json(config, folder / CONFIG)


def write_huggingface(backbone: Backbone, folder: Path, metadata: dict[str, str] | None = None) -> None:
    """Write configuration, weights with metadata, and image processor of ``Dinov2Model``, with or without registers.

    The image processor resizes photos as this package does: to the model's own size, without cropping.

    Raises:
        ExportError: if the model is not a DINOv2, or layer, norm or stride are not the model's own.
    """
    model: Any = plain_timm(backbone, "huggingface").model
    config = _dinov2_config(model, backbone.name)
    write_tensors(_dinov2_state(model), folder / WEIGHTS, {"format": "pt"} | (metadata or {}))
    _write_json(config, folder / CONFIG)
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
    _write_json(processor, folder / PROCESSOR)


def _write_json(values: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _dinov2_config(model: Any, name: str) -> dict[str, Any]:
    """``config.json`` of a timm DINOv2; ExportError if the model's architecture differs."""
    if differs := _not_dinov2(model):
        raise ExportError(
            f"huggingface supports DINOv2, with or without registers; {name} {differs}. Use timm, onnx or program"
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


def _dinov2_state(model: Any) -> dict[str, Tensor]:
    """A timm state dict with the published names of DINOv2 in transformers."""
    own = float_state(model)
    positions = own["pos_embed"]
    if model.no_embed_class:  # the class token already contains its position
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
        state |= _dinov2_block(index, own)
    return {key: value.contiguous() for key, value in state.items()}


def _dinov2_block(index: int, own: dict[str, Tensor]) -> dict[str, Tensor]:
    ours, theirs = f"blocks.{index}.", f"encoder.layer.{index}."
    state = {f"{theirs}layer_scale{number}.lambda1": own[f"{ours}ls{number}.gamma"] for number in (1, 2)}
    swiglu = len(own[f"{ours}mlp.fc1.weight"]) != own[f"{ours}mlp.fc2.weight"].shape[1]  # two halves, one is a gate
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
    """Difference between a model and DINOv2; None for a DINOv2."""
    if not isinstance(model, VisionTransformer):
        return f"is a {type(model).__name__}"
    block: Any = model.blocks[0]
    h, w = model.patch_embed.grid_size or (0, 1)
    swiglu = isinstance(block.mlp, GluMlp)
    hidden = block.mlp.fc2.in_features
    expected = hidden // model.embed_dim * model.embed_dim
    if swiglu:  # transformers derives the hidden width of a gated layer from that of a plain one
        expected = (int(model.embed_dim * 4 * 2 / 3) + 7) // 8 * 8
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
    return next((difference for difference, applies in wrong.items() if applies), None)


def write_extractor(extractor: DenoisedViT, folder: Path) -> None:
    """Write a float32 file for :func:`load_extractor`.

    Raises:
        ExportError: if the backbone is not a timm model.
    """
    backbone = extractor.backbone
    if not isinstance(backbone, TimmBackbone):
        raise ExportError(f"safetensors supports models of timm, got {backbone.name}; use onnx or program")
    tensors = {_BACKBONE + key: value for key, value in float_state(backbone.model).items()}
    head: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION, "positions": extractor.positions}
    head["backbone"] = {key: getattr(backbone, key) for key in ("name", "stride", "layer", "norm")}
    if extractor.denoiser is not None:
        head["denoiser"] = extractor.denoiser.config
        tensors |= {_DENOISER + key: value for key, value in float_state(extractor.denoiser).items()}
    elif extractor.subspace is not None:
        head["subspace"] = {"backbone": extractor.subspace.backbone, "info": extractor.subspace.info}
        tensors[_SUBSPACE] = extractor.subspace.directions.detach().float().cpu().contiguous()
    elif extractor.artifact is not None:
        artifact = extractor.artifact
        # Without the names of photos, because the file may be shared.
        info = {key: value for key, value in artifact.info.items() if key not in ("photos", "skipped")}
        head["artifact"] = {"size": artifact.size, "backbone": artifact.backbone, "info": info}
        tensors[_ARTIFACT] = artifact.values.detach().float().cpu().contiguous()
    write_tensors(tensors, folder / WEIGHTS, {KEY: json.dumps(head)})


def load_extractor(
    path: str | Path, *, device: str | torch.device = "auto", dtype: Dtype | torch.dtype = "auto"
) -> DenoisedViT:
    """Read a file of ``dvit export --format safetensors``.

    Args:
        path: its directory, or the file.
        device: ``auto`` is CUDA, then MPS, then the CPU.
        dtype: ``auto`` is bfloat16 if the hardware is fast at it, else float32.

    Raises:
        FormatError: if the file is missing, damaged, of another type, or from a newer version.
    """
    path = Path(path).expanduser()
    path = path / WEIGHTS if path.is_dir() else path
    with open_own(path, FORMAT, FORMAT_VERSION, "an extractor", ("backbone", "positions")) as (head, file):
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no dict
    try:
        return _built(head, tensors, str(path), device, dtype)
    except DenoisingVitError as error:
        raise FormatError(f"{path}: damaged extractor ({error})") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"{path}: damaged extractor ({type(error).__name__}: {error})") from error


def _built(
    head: dict[str, Any], tensors: dict[str, Any], source: str, device: str | torch.device, dtype: Any
) -> DenoisedViT:
    about = head["backbone"]
    name = str(about["name"])
    model = build_timm_model(name, pretrained=False)
    load_weights(model, below(_BACKBONE, tensors), name=name, source=source)
    require_finite(model, source)
    options = {key: about[key] for key in ("stride", "layer", "norm")}
    backbone = TimmBackbone(model, name=name, weights=Path(source).name, **options)
    if "denoiser" in head:
        cleaner: Denoiser | Artifact | Subspace = Denoiser(**head["denoiser"])
        cleaner.load_state_dict(below(_DENOISER, tensors))
        cleaner.eval().requires_grad_(False)
    elif "subspace" in head:
        cleaner = Subspace(tensors[_SUBSPACE], head["subspace"]["backbone"], head["subspace"]["info"])
    else:
        record = head["artifact"]
        size = cast("tuple[int, int]", tuple(record["size"]))
        cleaner = Artifact(tensors[_ARTIFACT].float(), size, record["backbone"], record["info"])
    made = DenoisedViT(backbone, cleaner, positions=float(head["positions"]))  # checks that they match
    place = device_at(device)
    return made.to(device=place, dtype=dtype_on(dtype, place))
